"""Names of the built-in datasets, and what sources are called, for checks that must import nothing. `registry.py` says
what the names stand for."""

from components.config.data import Source

DATASETS = ("c4", "c4_test", "c4_validation", "pystdlib", "pystdlib_validation", "synthetic")


def name_of(source: Source) -> str:
    """How a source is called: its own name, its dataset's, or the last part of its path without extensions."""
    last = (source.path or "").rstrip("/").rpartition("/")[2]
    return source.name or source.dataset or last.partition(".")[0] or last
