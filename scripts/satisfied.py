"""Exit 0 if this interpreter satisfies pyproject.toml's ranges, with the extras named as arguments; else 1, and why.

Ranges, not pins: whoever trains in an environment of their own (a GPU container, say) keeps it. Needs only the standard
library; versions are compared by `packaging`, or by the copy of it that every pip carries.
"""

import sys
import tomllib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

try:
    from packaging.requirements import Requirement
    from packaging.specifiers import SpecifierSet
except ImportError:
    from pip._vendor.packaging.requirements import Requirement
    from pip._vendor.packaging.specifiers import SpecifierSet


def missing(extras: list[str]) -> list[str]:
    """A line for each requirement that is not met."""
    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
    lines = list(project["dependencies"])
    for extra in extras:
        lines += project["optional-dependencies"][extra]
    found = []
    if not SpecifierSet(project["requires-python"]).contains(sys.version.split()[0], prereleases=True):
        found.append(f"python {project['requires-python']}: {sys.version.split()[0]} is running")
    for requirement in map(Requirement, lines):
        try:
            have = version(requirement.name)
        except PackageNotFoundError:
            found.append(f"{requirement}: not installed")
            continue
        if not requirement.specifier.contains(have, prereleases=True):
            found.append(f"{requirement}: {have} is installed")
    return found


if __name__ == "__main__":
    problems = missing(sys.argv[1:])
    print("\n".join(problems), file=sys.stderr, end="\n" if problems else "")
    sys.exit(bool(problems))
