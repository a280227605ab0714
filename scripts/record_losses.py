#!/usr/bin/env python
"""Write the golden losses of debug flavors anew (`tests/golden/losses`), with the reason why they change.

    scripts/record_losses.py --reason "why" [NAME ...]

NAME: family and config, such as qwen3_debug_model_moe; none: those that have no file yet. The same reason belongs into
the commit.
"""

import argparse
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # so that it runs as a script, from any folder

from tests.models.golden import FOLDER, configs, losses, name_of, write  # noqa: E402


def main() -> int:
    """Record. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="which; none: those without a file")
    parser.add_argument("--reason", required=True, help="why they change")
    asked = parser.parse_args()
    known = {name_of(config): config for config in configs()}
    if unknown := [name for name in asked.names if name not in known] or not asked.reason.strip():
        print(f"{unknown}: give a reason, and names among {', '.join(known)}", file=sys.stderr)
        return 2
    for name in asked.names or [name for name in known if not (FOLDER / f"{name}.json").exists()]:
        with tempfile.TemporaryDirectory() as folder:
            print(write(known[name], asked.reason, losses(known[name], Path(folder), 1)).relative_to(ROOT))
    return 0


if __name__ == "__main__":
    sys.exit(main())
