"""What produced a run: versions and the git revision, saved with it."""

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version

from components.runtime.paths import project_root


def versions() -> dict[str, str]:
    """Versions of espalier, torch and Python, and the platform. An absent package is "n/a"; torch is not imported."""
    return {
        "espalier": _version("espalier"),
        "torch": _version("torch"),
        "python": platform.python_version(),
        "platform": platform.platform(),
    }


def git_revision() -> str | None:
    """The commit of the project's checkout, with "-dirty" if tracked files differ from it; None outside a checkout."""
    root = project_root()
    if not (root / ".git").exists():  # site-packages inside someone else's repository
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "n/a"
