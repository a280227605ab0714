"""Names of the built-in optimizers, for checks that must not import torch."""

OPTIMIZERS = ("Adam", "AdamW")
