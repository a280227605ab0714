"""What the evidence came to: `figures.json`, from which `docs/reliability.md` is generated.

The tests write it when ESPALIER_RECORD is set, and the result is checked in; without, they only assert:

    ESPALIER_RECORD=1 pytest tests/reliability && scripts/generate_docs.py
"""

import json
import os
from pathlib import Path

FILE = Path(__file__).with_name("figures.json")


def figures() -> dict[str, str]:
    """Name of the evidence → what was found."""
    return json.loads(FILE.read_text()) if FILE.exists() else {}


def record(name: str, found: str) -> None:
    """Note what a test has found, if this run is to be kept."""
    if os.environ.get("ESPALIER_RECORD"):
        FILE.write_text(json.dumps({**figures(), name: found}, sort_keys=True, indent=1, ensure_ascii=False) + "\n")
