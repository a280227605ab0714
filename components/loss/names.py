"""Names of the built-in losses, for checks that must not import torch."""

LOSSES = ("cross_entropy", "chunked_cross_entropy")
