"""pystdlib: the source of the running Python's standard library, about 12 MB of real code that every machine has.

What it holds differs from Python to Python, so the version is part of the fingerprint, and golden values never read it.
Every twentieth file, in sorted order, is held out for validation.
"""

import os
import platform
import sysconfig
from pathlib import Path

from components.data.documents import BadRecord
from components.data.textfiles import TextFiles
from components.data.watch import LocalFile
from components.runtime.errors import DataError

SKIPPED_FOLDERS = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"})
GENERATED = "_sysconfigdata"  # written when Python was built: names of this machine's folders, not source
HELD_OUT_EVERY = 20


class StandardLibrary(TextFiles):
    """RandomAccess over source files. The few that are not UTF-8 are no fault of the user's: skipped, and counted."""

    def document(self, index: int) -> str:
        """Text of file `index`. Raises BadRecord, marked harmless, if it is not UTF-8."""
        try:
            return super().document(index)
        except BadRecord as error:
            error.harmless = True
            raise


def stdlib_files(root: Path) -> list[Path]:
    """Source files below `root` in sorted order of their relative paths, without tests and installed packages."""
    found = []
    for folder, folders, names in os.walk(root):
        folders[:] = [x for x in folders if x not in SKIPPED_FOLDERS]
        found += [Path(folder, x) for x in names if x.endswith(".py") and not x.startswith(GENERATED)]
    return sorted(found, key=lambda x: x.relative_to(root).as_posix())


def open_stdlib(split: str, root: Path | None = None) -> StandardLibrary:
    """The `train` or `validation` files. Raises DataError if Python came without its sources."""
    root = root or Path(sysconfig.get_path("stdlib"))
    files = stdlib_files(root)
    if len(files) < HELD_OUT_EVERY:
        raise DataError(
            f"{root}: only {len(files)} source files of the standard library; install them, or choose another dataset"
        )
    held_out = split == "validation"
    chosen = [x for i, x in enumerate(files) if (i % HELD_OUT_EVERY == HELD_OUT_EVERY - 1) == held_out]
    return StandardLibrary([LocalFile(x) for x in chosen], {"python": platform.python_version(), "split": split})
