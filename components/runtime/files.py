"""How many files a process may have open: many shells allow 1024, and connections count.

A rank is connected to every other one by each gloo group of all ranks, of which there are three where checkpoints are
saved; whoever hosts the store of the ranks has four connections to each. So some hundred ranks need more. The hard
limit is the administrator's and is not touched. Torch-free.
"""

from contextlib import suppress

MOST = 1 << 17
"""Enough for the store of 32,000 ranks; without a bound some programs look at a billion possible files."""


def allow_open_files() -> None:
    """Raise this process's soft limit on open files as far as it may be, up to `MOST`. A no-op where there is none."""
    try:
        import resource
    except ImportError:  # Windows
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MOST if hard == resource.RLIM_INFINITY else min(hard, MOST)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with suppress(ValueError, OSError):  # macOS has a bound below its hard limit
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
