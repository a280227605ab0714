"""The four packages have common names: a folder of the same name earlier on the path can stand in for one of ours.

Checked before anything is imported from them: otherwise the first sign is an AttributeError deep inside somebody's
code."""

import importlib.util
import sys
from pathlib import Path

ROOMS = ("models", "components", "experiments")


def shadowed_rooms() -> list[str]:
    """A line for each room that resolves to a folder outside this project."""
    home = Path(__file__).resolve().parent.parent
    problems = []
    for room in ROOMS:
        spec = importlib.util.find_spec(room)
        found = (spec.submodule_search_locations or [spec.origin]) if spec else []
        places = [Path(place).resolve() for place in found if place]
        if home / room not in places:
            problems.append(
                f"`{room}` is {places[0] if places else 'nowhere'} instead of Espalier's {home / room}:"
                " run from another folder, or rename that one"
            )
    return problems


def guard_rooms() -> None:
    """Exit with code 2 if a room is shadowed, naming what shadows it."""
    problems = shadowed_rooms()
    if problems:
        print("\n".join(f"error: {problem}" for problem in problems), file=sys.stderr)
        raise SystemExit(2)
