"""Folders: where the project stands, and the folder that a run writes into."""

import tempfile
from pathlib import Path

from components.runtime.errors import UserError


def project_root() -> Path:
    """The folder that holds the packages: the checkout, or site-packages."""
    return Path(__file__).resolve().parents[2]


def prepare_folder(path: Path | str) -> Path:
    """Create a folder (`job.dump_folder`) and what leads to it, and find out whether it can be written to.

    Writing is tried: permission bits say nothing about read-only mounts, quotas, or root. Raises UserError.
    """
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(
            f"job.dump_folder = {str(path)!r}: cannot write there: {error.strerror};"
            " choose another folder with --job.dump_folder=…, or make it writable"
        ) from error
    return folder
