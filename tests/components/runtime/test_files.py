"""The soft limit on open files goes up to the hard one, and never down."""

import resource

import pytest

from components.runtime.files import MOST, allow_open_files


@pytest.mark.parametrize("below", [True, False])
def test_as_many_open_files_as_may_be(below: bool) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = MOST if hard == resource.RLIM_INFINITY else min(hard, MOST)
    start = most - 1 if below else most
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (start, hard))
        allow_open_files()
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (most, hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
