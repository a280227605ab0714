"""The parts that the Trainer and the models are made of; sibling rooms do not know each other."""
