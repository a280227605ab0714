"""Where a relative path points to: the current folder first, then the project's, which holds the shipped assets."""

from pathlib import Path

from components.runtime.paths import project_root


def roots() -> tuple[Path, ...]:
    """Folders that a relative path is looked up in. The first is empty, so that messages show paths as given."""
    return Path(), project_root()


def find_path(path: str) -> Path | None:
    """The first existing file or folder of that name; None if there is none. A leading `~` is the home folder."""
    for root in roots():
        candidate = root / Path(path).expanduser()
        if candidate.exists():
            return candidate
    return None
