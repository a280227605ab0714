"""One folder per model family, and the TrainSpec registry."""
