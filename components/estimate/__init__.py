"""What a job would cost: the model behind the dry run."""
