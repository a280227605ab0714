"""Tables of sources, and what `[data]` makes of their documents: from a job's sections to its rows."""

import dataclasses
import json
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from components.config.data import Source
from components.data.token_writer import IndexedWriter
from components.mesh.batch import IGNORE
from components.runtime.errors import ConfigError, DataError
from tests.components.data.corpus import tokenizer, write_lines
from tests.components.data.test_build import job, loader, refusal

shows = pytest.mark.shows
PLAIN = {"add_bos": False, "add_eos": True, "shuffle": False}
END = tokenizer().eos_id


def documents(folder: Path, name: str, word: str, lengths: Sequence[int]) -> Source:
    """A source whose documents repeat one word, which is one token; each ends with an end token."""
    write_lines(folder / f"{name}.jsonl", [" ".join([word] * length) for length in lengths])
    return Source(path=str(folder / f"{name}.jsonl"))


def token_file(folder: Path, name: str, lengths: Sequence[int], first: int) -> Source:
    """A source of token files whose documents are runs of one number each, `first` and up."""
    with IndexedWriter(str(folder / name), np.dtype("uint16")) as writer:
        for i, length in enumerate(lengths):
            writer.add_document(np.full(length, first + i))
    return Source(path=str(folder / name))


def config(*sources: Source, rows: int = 2, seq_len: int = 8, **data: Any) -> Any:
    training = {"seq_len": seq_len, "global_batch_size": rows, "local_batch_size": rows, "steps": 4}
    return job(training=training, data={**PLAIN, **data, "sources": list(sources)})


def rows_of(config: Any, steps: int) -> list[tuple[list[int], list[int]]]:
    """Tokens and labels of the first rows."""
    batches = [x.batch for x in islice(iter(loader(config)), steps)]
    return [(row, labels) for x in batches for row, labels in zip(x.tokens.tolist(), x.labels.tolist(), strict=True)]


def replaced(source: Source, **changes: Any) -> Source:
    return Source(**{**vars(source), **changes})


@shows("data.sources", "data.unit")
@pytest.mark.parametrize("packing", ["concat", "best_fit"])
@pytest.mark.parametrize(("unit", "share"), [("tokens", 3 / 4), ("documents", 3 * 5 / (3 * 5 + 2))])
def test_weights_are_shares_of_tokens_or_of_documents(tmp_path: Path, unit: str, share: float, packing: str) -> None:
    """Weights 3 to 1, documents of 5 and of 2 tokens; from one index and from streams."""
    long, short = token_file(tmp_path, "long", [5] * 40, 100), token_file(tmp_path, "short", [2] * 40, 10)
    mixed = config(
        replaced(long, weight=3.0), replaced(short, weight=1.0), rows=1, seq_len=20, unit=unit, packing=packing
    )
    tokens = [x for row, _ in rows_of(mixed, 32) for x in row if x]
    assert sum(x >= 100 for x in tokens) / len(tokens) == pytest.approx(share, abs=5 / len(tokens))


def test_token_files_are_not_filled_in_the_middle(tmp_path: Path) -> None:
    tokens = token_file(tmp_path, "tokens", [5, 7], 10)
    with pytest.raises(ConfigError) as error:
        loader(config(replaced(tokens, fim_rate=0.5)))
    assert str(error.value) == (
        "source 'tokens': fim_rate = 0.5: is for text, and"
        f" {tmp_path / 'tokens'} holds tokens; leave it out, or give the text"
    )


@shows("data.order", "data.cache_folder")
def test_token_files_are_ordered_here_or_as_megatron_does(tmp_path: Path) -> None:
    source = token_file(tmp_path, "tokens", [5, 7, 4, 9, 6, 8], 10)
    cache = tmp_path / "cache"
    native = config(source, order="native", cache_folder=str(cache))
    assert rows_of(native, 1) == [
        ([10] * 5 + [11] * 3, [10] * 4 + [IGNORE] + [11] * 3),
        ([11] * 4 + [12] * 4, [11] * 3 + [IGNORE] + [12] * 3 + [IGNORE]),
    ]
    assert len(list(cache.glob("native-*"))) == 1
    theirs = config(source, order="megatron", cache_folder=str(cache))
    found = [row for row, _ in rows_of(theirs, 4)]
    assert len(found) == 8
    assert found != [row for row, _ in rows_of(native, 4)]
    assert len(list(cache.glob("megatron-*"))) == 1


@pytest.mark.parametrize("order", ["native", "megatron"])
def test_validation_holds_out_what_training_does_not_read_in_any_order(order: Any, tmp_path: Path) -> None:
    """Token n is in sequence n // 6, from 1 on; the documents differ much in how many sequences they have."""
    with IndexedWriter(tmp_path / "a", np.uint16) as writer:
        for first, count in ((1, 1), (2, 1), (3, 7), (10, 1)):
            writer.add_document(range(6 * first, 6 * (first + count)), [6] * count)
    source = Source(path=str(tmp_path / "a"), split="1,1")
    split = job(
        training={"seq_len": 4, "local_batch_size": 1, "steps": 15},
        validation={"seq_len": 4, "local_batch_size": 1, "sources": [source]},
        data={"sources": [source], "order": order, **({"on_end": "stop"} if order == "native" else {})},
    )
    read = []
    for held_out in (False, True):
        batches = [x.batch.tokens for x in islice(iter(loader(split, validation=held_out)), 15)]
        read.append(set((torch.cat(batches).flatten() // 6).tolist()) - {0})  # 0: padding
    border = 6 if order == "megatron" else 3  # behind half of ten sequences, or of four documents
    assert read == [set(range(1, border)), set(range(border, 11))]


def test_megatron_order_wants_token_files(tmp_path: Path) -> None:
    mixed = config(token_file(tmp_path, "a", [5], 10), documents(tmp_path, "b", "x", [3]), order="megatron")
    assert refusal(ConfigError, mixed) == (
        "data.order = \"megatron\": source 'b' is not made of token files; write them with scripts/preprocess_data.py,"
        ' or set data.order = "native"'
    )


def test_token_files_in_other_company_are_packed_like_text(tmp_path: Path) -> None:
    mixed = config(token_file(tmp_path, "a", [4, 4], 10), documents(tmp_path, "b", "def", [3, 3]), rows=1)
    (word,) = set(tokenizer().encode("def def")[1:])
    tokens = {x for row, _ in rows_of(mixed, 4) for x in row}
    assert tokens >= {10, 11, word, END}


@shows("data.packing", "data.long_documents", "data.packing_window")
def test_packings(tmp_path: Path) -> None:
    """Documents of 6, 6, 3, 12 tokens, rows of 8 and the label after them."""
    source = token_file(tmp_path, "a", [6, 6, 3, 12], 10)

    def packed(steps: int, **keys: Any) -> list[list[int]]:
        return [[x for x in row if x] for row, _ in rows_of(config(source, rows=1, **keys), steps)]

    assert packed(2, packing="concat") == [[10] * 6 + [11] * 2, [11] * 4 + [12] * 3 + [13]]
    assert packed(4, packing="padded") == [[10] * 6, [11] * 6, [12] * 3, [13] * 8]
    assert packed(4, packing="padded", long_documents="drop") == [[10] * 6, [11] * 6, [12] * 3, [10] * 6]
    assert packed(5, packing="padded", long_documents="truncate")[3:] == [[13] * 8, [10] * 6]
    whole = [packed(6, packing="best_fit", packing_window=n, long_documents="drop") for n in (1, 3)]
    first, second = [10] * 6, [11] * 6
    assert whole == [
        [first, second + [12] * 2] * 3,
        [first + [12] * 2, second, first, second + [12] * 2, first + [12] * 2, second],
    ]
    error = refusal(DataError, config(token_file(tmp_path, "b", [12], 10), packing="padded", long_documents="error"))
    assert error.startswith(f"{tmp_path}/b: document 0: a document of 12 tokens is longer than a row, which takes 9 (")


@shows("data.cross_document_labels")
def test_labels_cross_documents_where_they_are_wanted(tmp_path: Path) -> None:
    source = token_file(tmp_path, "a", [3, 9], 10)
    cross = config(source, rows=1, cross_document_labels=True)
    assert rows_of(cross, 1) == [([10] * 3 + [11] * 5, [10] * 2 + [11] * 6)]
    assert rows_of(config(source, rows=1), 1) == [([10] * 3 + [11] * 5, [10] * 2 + [IGNORE] + [11] * 5)]


def test_shares_hold_out_what_training_does_not_read(tmp_path: Path) -> None:
    write_lines(tmp_path / "x.jsonl", [f"document {i}" for i in range(20)])
    source = Source(path=str(tmp_path / "x.jsonl"), split="9,1")
    split = job(
        training={"seq_len": 64, "local_batch_size": 1},
        validation={"seq_len": 64, "local_batch_size": 1, "sources": [source]},
        data={"sources": [source], "on_end": "stop"},
    )

    def text(validation: bool) -> str:
        steps = iter(loader(split, validation=validation))
        return "".join(tokenizer().decode(x.batch.tokens[0].tolist()) for x in steps)

    train, held_out = text(False), text(True)
    assert [f"document {i}<" in held_out for i in range(20)] == [False] * 18 + [True] * 2
    assert not any(f"document {i}<" in train for i in (18, 19))


def test_a_source_leaves_after_its_epochs(tmp_path: Path) -> None:
    short, long = documents(tmp_path, "short", "def", [3] * 2), documents(tmp_path, "long", "return", [3] * 40)
    (word,) = set(tokenizer().encode("def def")[1:])
    first = tokenizer().encode("def")[0]
    rows = rows_of(config(replaced(short, epochs=2), long, rows=1), 30)
    assert sum(x in (word, first) for row, _ in rows for x in row) == 2 * 2 * 3  # documents, epochs, words


def test_the_data_end_when_all_sources_have(tmp_path: Path) -> None:
    a, b = token_file(tmp_path, "a", [4] * 4, 10), token_file(tmp_path, "b", [4] * 4, 20)
    for packing, rows in (("concat", (16 + 2 * 16 - 1) // 8), ("padded", 4 + 2 * 4)):
        ending = config(replaced(a, epochs=1), replaced(b, epochs=2), rows=1, packing=packing)
        assert loader(ending).ends
        assert len(rows_of(ending, 100)) == rows
        assert not loader(config(replaced(a, epochs=1), b, rows=1, packing=packing)).ends


def test_datasets_that_make_rows_stand_alone(tmp_path: Path) -> None:
    mixed = config(Source(dataset="synthetic"), documents(tmp_path, "a", "x", [3]))
    assert refusal(ConfigError, mixed) == (
        "source 'synthetic': its dataset makes whole rows, which cannot be mixed with others; make it the only source"
    )
    alone = config(Source(dataset="synthetic"))
    assert next(iter(loader(alone))).batch.tokens.shape == (2, 8)


@pytest.mark.parametrize("keys", [{"kind": "text"}, {"fim_rate": 0.5}, {"text_field": "body"}, {"split": "9,1"}])
def test_datasets_that_make_rows_take_no_keys_of_documents(keys: dict[str, Any]) -> None:
    ((key, value),) = keys.items()
    assert refusal(ConfigError, config(Source(dataset="synthetic", **keys))) == (
        f"source 'synthetic': {key} = {value!r}: is for documents, and its dataset makes whole rows; leave it out"
    )


def test_rows_that_a_dataset_makes_are_not_packed() -> None:
    why = 'its dataset makes whole rows, which are not packed; set it to "concat"'
    rows = Source(dataset="synthetic")
    assert refusal(ConfigError, config(rows, packing="padded")) == (
        f"source 'synthetic': data.packing = \"padded\": {why}"
    )
    short = job(training={"dataset": "synthetic"}, data={"packing": "best_fit"})
    assert refusal(ConfigError, short) == f"dataset 'synthetic': data.packing = \"best_fit\": {why}"
    held_out = job(validation={"sources": [rows], "seq_len": 8, "steps": 1}, data={"packing": "best_fit"})
    assert next(iter(loader(held_out, validation=True))).batch.tokens.shape[1] == 8  # packing is for training


def test_a_chat_needs_a_template(tmp_path: Path) -> None:
    path = tmp_path / "chat.jsonl"
    path.write_text(json.dumps({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}))
    chats = config(Source(path=str(path), kind="chat"))
    assert refusal(ConfigError, chats) == (
        "source 'chat': the tokenizer in ./tests/assets/tokenizer has no chat template; set chat_template to a file"
        " that holds one, or take the tokenizer of a model that was trained on chats"
    )


def test_instructions_train_on_answers(tmp_path: Path) -> None:
    path = tmp_path / "qa.jsonl"
    path.write_text(json.dumps({"q": "What is x?", "a": "one"}) + "\n")
    source = Source(path=str(path), kind="instruction", prompt="{q}", answer="{a}")
    batch = next(iter(loader(config(source, rows=1, seq_len=32, packing="padded", add_bos=True)))).batch
    trained = batch.labels[0][batch.labels[0] != IGNORE].tolist()
    assert tokenizer().decode(trained) == "one<|end_of_text|>"
    assert torch.equal(batch.tokens[0][1 : 1 + len(trained)] != 0, torch.ones(len(trained), dtype=torch.bool))


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
def test_a_resume_with_other_sources_says_which_facts_differ(tmp_path: Path, packing: str) -> None:
    """Numbers in a cursor go by the order of the tables, so that counts too."""
    a, b = token_file(tmp_path, "a", [5] * 9, 10), token_file(tmp_path, "b", [4] * 9, 50)
    state = json.loads(json.dumps(loader(config(a, b, packing=packing)).state_dict([]), sort_keys=True))
    loader(config(a, b, packing=packing)).load_state(state)

    def told(*sources: Source) -> str:
        with pytest.raises(DataError) as error:
            loader(config(*sources, packing=packing)).load_state(state)
        text = str(error.value).removeprefix("the saved loader state belongs to other data: ")
        return text.removesuffix("; restore these, or start a new job")

    assert told(b, a) == "order_of_sources was ['a', 'b'], is ['b', 'a']"
    assert told(replaced(a, weight=3.0), b) == "sources.a.weight was 1.0, is 3.0"
    assert "sources.b is missing; sources.c is new" in told(a, replaced(b, name="c"))


def test_token_files_are_no_text(tmp_path: Path) -> None:
    source = token_file(tmp_path, "tokens", [4], 10)
    assert refusal(ConfigError, config(replaced(source, kind="text"))) == (
        f"source 'tokens': kind = \"text\": {tmp_path}/tokens holds tokens; leave kind out"
    )
    assert refusal(ConfigError, config(replaced(source, text_field="body"))) == (
        f"source 'tokens': text_field = 'body': is for text, and {tmp_path}/tokens holds tokens; leave it out, or give"
        " the text"
    )
    assert refusal(ConfigError, config(replaced(source, subset="en"))) == (
        f"source 'tokens': subset = 'en': is for text, and {tmp_path}/tokens holds tokens; leave it out, or give the"
        " text"
    )


@pytest.mark.parametrize("dataset", ["pystdlib", "pystdlib_validation", "c4_test", "c4"])
def test_a_path_takes_the_place_of_a_built_in_dataset(dataset: str, tmp_path: Path) -> None:
    """Text and tokens, in both forms."""
    for there in (documents(tmp_path, "text", "x", [5, 3]), token_file(tmp_path, "tokens", [5, 4], 10)):
        found = rows_of(config(there), 2)
        assert rows_of(config(replaced(there, dataset=dataset)), 2) == found
        short = config()
        training = dataclasses.replace(short.training, dataset=dataset, dataset_path=there.path)
        assert rows_of(dataclasses.replace(short, training=training), 2) == found


def test_errors_of_a_source_name_it(tmp_path: Path) -> None:
    """Whatever finds them: its columns, what makes tokens of its records, its files."""
    good = documents(tmp_path, "good", "x", [5])
    other = replaced(documents(tmp_path, "other", "x", [5]), kind="instruction", answer="{b}")
    broken = replaced(other, prompt="{a", chat_template="no/such.jinja")
    assert refusal(ConfigError, config(good, broken)) == (
        "source 'other': prompt = '{a': expected '}' before end of string; columns stand in braces, a brace itself is"
        " doubled"
    )
    template = tmp_path / "bad.jinja"
    template.write_text("{% for m in messages %}")
    mended = replaced(other, prompt="{a}", chat_template=str(template))
    assert refusal(DataError, config(good, mended)).startswith(f"source 'other': {template}: ")
    (tmp_path / "other.jsonl").write_bytes(b"")
    assert refusal(DataError, config(good, replaced(good, path=f"{tmp_path}/other.jsonl"))) == (
        f"source 'other': {tmp_path}/other.jsonl: no records in 1 file(s), all empty; give a dataset that is not empty"
    )
