"""The small files that lie beside weights: those of the tokenizer, copied, and what they say of special tokens.

Which tokens begin and end a text is not a fact of the model's shape, so config.json and generation_config.json take it
from the folder of the tokenizer: from the config.json there, as whoever published the model wrote it, else from the
tokenizer itself. What cannot be found out is left out, and transformers then goes by its own defaults. Torch-free.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from components.checkpoint.hf_config import CONFIG
from components.runtime.logging import logger

GENERATION = "generation_config.json"
ASSETS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
"""Files of a tokenizer; those that are there are copied."""
_TOKENS = ("bos_token", "eos_token", "pad_token")


def tokenizer_files(assets: str | None) -> list[Path]:
    """Those of a tokenizer in a local folder that are exported too."""
    found = [Path(assets) / name for name in ASSETS] if assets is not None else []
    return [path for path in found if path.is_file()]


def copied_files(assets: str | None) -> list[Path]:
    """All files of a local folder that are exported as they are."""
    more = [Path(assets) / GENERATION] if assets is not None else []
    return [*tokenizer_files(assets), *(path for path in more if path.is_file())]


def generation_config(ids: Mapping[str, Any]) -> bytes:
    """A generation_config.json that says nothing but the special tokens."""
    return (json.dumps({"_from_model_config": True, **ids}, indent=2, sort_keys=True) + "\n").encode()


def token_ids(assets: str | None) -> dict[str, Any]:
    """`bos_token_id`, `eos_token_id`, `pad_token_id`, a number or a list each, as far as a folder says them."""
    if assets is None:
        return {}
    folder = Path(assets)
    config = _read(folder / CONFIG)
    text = config.get("text_config")
    said = {**(text if isinstance(text, dict) else {}), **{key: v for key, v in config.items() if v is not None}}
    found = {f"{name}_id": said[f"{name}_id"] for name in _TOKENS if _are_ids(said.get(f"{name}_id"))}
    return found or _of_tokenizer(folder)


def _are_ids(value: Any) -> bool:
    each = value if isinstance(value, list) and value else [value]
    return all(type(number) is int and number >= 0 for number in each)


def _of_tokenizer(folder: Path) -> dict[str, Any]:
    """The tokens that tokenizer_config.json names, looked up in tokenizer.json."""
    config = _read(folder / "tokenizer_config.json")
    named = {name: config[name] for name in _TOKENS if config.get(name) is not None}
    added = _read(folder / "tokenizer.json").get("added_tokens") if named else None
    ids = {each.get("content"): each.get("id") for each in added or () if isinstance(each, dict)}
    found = {name: ids.get(_text(token)) for name, token in named.items()}
    return {f"{name}_id": number for name, number in found.items() if type(number) is int}


def _text(token: Any) -> str:
    """A token as it is written: in some files with how it is stripped."""
    return str(token.get("content") if isinstance(token, dict) else token)


def _read(path: Path) -> dict[str, Any]:
    """The object that a file of JSON holds; nothing if there is none."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        logger.warning("'%s' is not JSON (%s): special tokens are not looked up in it", path, error)
        return {}
    return content if isinstance(content, dict) else {}
