"""Names of the built-in datasets, for checks that must import nothing. `registry.py` says what they stand for."""

DATASETS = ("c4", "c4_test", "c4_validation", "pystdlib", "pystdlib_validation", "synthetic")
