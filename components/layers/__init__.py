"""The blocks that models are built of."""
