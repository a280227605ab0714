"""Did you mean …? The tail of a message about a name that does not exist."""

import difflib
from collections.abc import Iterable


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`; did you mean X?` with the nearest of the known names, whatever their case; nothing where none is near."""
    lowered = {candidate.lower(): candidate for candidate in known}
    near = difflib.get_close_matches(name.lower(), list(lowered), n=1)
    return f"; did you mean {lowered[near[0]]}?" if near else ""
