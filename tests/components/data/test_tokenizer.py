"""The tokenizer: what it makes of text, and what it says when its files are not there or not right."""

import json
import pickle
import shutil
from pathlib import Path

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import processors
from tokenizers.models import BPE

from components.data.tokenizer import Tokenizer, load_tokenizer
from components.runtime.errors import DataError

ASSET = Path("tests/assets/tokenizer")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(ASSET, tmp_path / "tokenizer"))


def test_the_shipped_one() -> None:
    tokenizer = load_tokenizer(str(ASSET))
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (2048, 0, 1)
    text = "def f(x):\n    return x + 1  # ö €\n"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode_batch([text, ""]) == [tokenizer.encode(text), []]
    assert tokenizer.decode([0, 1]) == "<|begin_of_text|><|end_of_text|>"


def test_text_never_becomes_a_special_token() -> None:
    for tokenizer in (load_tokenizer(str(ASSET)), pickle.loads(pickle.dumps(load_tokenizer(str(ASSET))))):
        ids = tokenizer.encode("a<|end_of_text|>")
        assert min(ids) > 1
        assert tokenizer.decode(ids) == "a<|end_of_text|>"


def test_post_processors_truncation_and_padding_are_bypassed() -> None:
    backend = Backend.from_file(str(ASSET / "tokenizer.json"))
    backend.post_processor = processors.TemplateProcessing(
        single="<|begin_of_text|> $0", special_tokens=[("<|begin_of_text|>", 0)]
    )
    backend.enable_truncation(3)
    backend.enable_padding(length=20)
    text = "one two three four five"
    assert Tokenizer(backend.to_str()).encode(text) == load_tokenizer(str(ASSET)).encode(text)


def test_a_vocabulary_with_gaps_counts_to_its_largest_id() -> None:
    assert Tokenizer(Backend(BPE(vocab={"a": 0, "b": 7}, merges=[])).to_str()).vocab_size == 8


def test_fingerprint(folder: Path) -> None:
    same = load_tokenizer(str(ASSET)).fingerprint
    assert load_tokenizer(str(folder)).fingerprint == same
    (folder / "tokenizer_config.json").write_text("{}")
    assert load_tokenizer(str(folder)).fingerprint != same


@pytest.mark.parametrize(
    ("config", "more", "ids"),
    [
        ({"bos_token": None, "eos_token": {"content": "<|end_of_text|>"}}, {}, (None, 1)),
        ({}, {"bos_token": "<|begin_of_text|>", "eos_token": {"content": "<|end_of_text|>"}}, (0, 1)),
        (None, None, (None, None)),
    ],
)
def test_begin_and_end_tokens(folder: Path, config: object, more: object, ids: tuple[int | None, int | None]) -> None:
    (folder / "tokenizer_config.json").unlink()
    for name, value in (("tokenizer_config.json", config), ("special_tokens_map.json", more)):
        if value is not None:
            (folder / name).write_text(json.dumps(value))
    tokenizer = load_tokenizer(str(folder))
    assert (tokenizer.bos_id, tokenizer.eos_id) == ids


def test_found_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_tokenizer("./tests/assets/tokenizer").vocab_size == 2048


def failure(path: Path | str) -> str:
    with pytest.raises(DataError) as error:
        load_tokenizer(str(path))
    return str(error.value)


def test_no_folder(tmp_path: Path) -> None:
    hint = "set model.hf_assets_path to a folder that holds tokenizer.json"
    assert failure("no/such") == f"no/such: no such folder; {hint}"
    assert failure(ASSET / "tokenizer.json") == f"{ASSET}/tokenizer.json: no such folder; {hint}"


def test_no_file(tmp_path: Path) -> None:
    hint = "set model.hf_assets_path to a folder that holds one"
    assert failure(tmp_path) == f"{tmp_path}: no tokenizer.json there (there is: nothing); {hint}"
    for name in ("tokenizer.model", "config.json"):
        (tmp_path / name).touch()
    assert failure(tmp_path) == (
        f"{tmp_path}: no tokenizer.json there (there is: config.json, tokenizer.model); {hint}"
    )


def test_unreadable_files(folder: Path) -> None:
    config, definition = folder / "tokenizer_config.json", folder / "tokenizer.json"
    config.write_text('{"eos_token": "<|eot|>"}')
    assert failure(folder) == (
        f"{definition}: special token '<|eot|>' is not in the vocabulary;"
        " mend tokenizer_config.json or special_tokens_map.json"
    )
    config.write_text('{\n "x": }')
    assert failure(folder) == f"{config}:2:7: not valid JSON (Expecting value); mend the file"
    config.write_text("[]")
    assert failure(folder) == f"{config}:1:1: not a JSON object; mend the file"
    config.unlink()
    definition.write_text('{"version": "1.0"}')
    message = failure(folder)
    assert message.startswith(f"{definition}: not a tokenizer definition (")
    assert message.endswith("); save it again with the tokenizers library")
    definition.write_bytes(b"{\xff")
    assert failure(folder) == f"{definition}: not UTF-8 at byte 1; mend or replace the file"
