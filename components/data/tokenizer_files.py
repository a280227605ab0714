"""The files beside `tokenizer.json`: text and JSON that users may have mended by hand, so errors say where."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from components.runtime.errors import DataError

CONFIG_FILES = ("tokenizer_config.json", "special_tokens_map.json")


def special_tokens(folder: Path, names: Sequence[str]) -> dict[str, str]:
    """Texts of the special tokens of these names, such as `eos_token`, each from the first file that has it.

    Raises DataError.
    """
    found: dict[str, str] = {}
    for file in (folder / name for name in CONFIG_FILES):
        values = read_object(file) if file.is_file() else {}
        for name in names:
            value = values.get(name)
            text = value.get("content") if isinstance(value, dict) else value
            if isinstance(text, str):
                found.setdefault(name, text)
    return found


def read_object(file: Path) -> dict[str, Any]:
    """A JSON file that holds an object. Raises DataError."""
    try:
        value = json.loads(read_text(file))
    except json.JSONDecodeError as error:
        raise DataError(f"{file}:{error.lineno}:{error.colno}: not valid JSON ({error.msg}); mend the file") from error
    if not isinstance(value, dict):
        raise DataError(f"{file}:1:1: not a JSON object; mend the file")
    return value


def read_text(file: Path) -> str:
    """A UTF-8 file. Raises DataError."""
    try:
        return file.read_text(encoding="utf-8")
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror}); check its permissions") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: not UTF-8 at byte {error.start}; mend or replace the file") from error
