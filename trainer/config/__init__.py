"""How a JobConfig is assembled from files and arguments, checked as a whole, and printed. Torch-free."""
