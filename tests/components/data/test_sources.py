"""Where documents come from: files, folders, globs, saved and streamed datasets, the standard library."""

import gzip
import json
import logging
import os
import platform
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import datasets as hugging_face
import pyarrow
import pyarrow.parquet
import pytest

from components.data.documents import BadRecord, DatasetRequest, RandomAccess, Sequential, place_of
from components.data.encoding import text_in
from components.data.files import open_files
from components.data.hub import HubStream
from components.data.indexed import RowIndex
from components.data.names import DATASETS
from components.data.parquet import Parquet
from components.data.registry import datasets, open_dataset, open_path
from components.data.stdlib import open_stdlib
from components.runtime.errors import ConfigError, DataError
from components.runtime.logging import logger
from tests.components.data.corpus import readers, texts, write_lines

EXTENSIONS = ".jsonl, .jsonl.gz, .jsonl.zst, .json, .json.gz, .json.zst, .parquet, .txt, .text, .md, .rst, .py"


def request(path: str | None = None, validation: bool = False, **more: Any) -> DatasetRequest:
    return DatasetRequest(path, "text", seq_len=8, vocab_size=10, seed=0, validation=validation, **more)


@pytest.mark.parametrize("name", ["x.jsonl", "x.json", "x.jsonl.gz", "x.json.zst"])
def test_json_lines(tmp_path: Path, name: str) -> None:
    documents = [*texts(50), "several\nlines", "ö €", ""]
    path = write_lines(tmp_path / name, documents)
    assert [x() for x in readers(path)] == documents
    opened = open_files(str(path))
    assert isinstance(opened, RandomAccess if name.endswith(("jsonl", "json")) else Sequential)


def test_sequential_records_from_the_middle(tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl.gz", ["a", "b"])
    write_lines(tmp_path / "b.jsonl.zst", ["c"])
    write_lines(tmp_path / "c.jsonl", ["d"])
    opened = open_files(str(tmp_path))
    assert isinstance(opened, Sequential)
    assert [[x() for x in opened.records(i)] for i in range(5)] == [[{"text": x} for x in "abcd"[i:]] for i in range(5)]


def test_lines_longer_than_a_chunk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("components.data.jsonlines.CHUNK", 7)
    documents = texts(9)
    for name in ("x.jsonl", "x.jsonl.gz", "x.jsonl.zst"):
        assert [x() for x in readers(write_lines(tmp_path / name, documents))] == documents


def test_folders_are_read_in_sorted_order(tmp_path: Path) -> None:
    for name in ("b/1.jsonl", "a.jsonl", "b/0.jsonl", ".hidden/x.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_lines(tmp_path / name, [name])
    (tmp_path / "LICENSE").write_text("not data")
    assert [x() for x in readers(tmp_path)] == ["a.jsonl", "b/0.jsonl", "b/1.jsonl"]
    assert [x() for x in readers(f"{tmp_path}/b/*.jsonl")] == ["b/0.jsonl", "b/1.jsonl"]
    assert [x() for x in readers(f"{tmp_path}/**/1.jsonl")] == ["b/1.jsonl"]


def test_text_files(tmp_path: Path) -> None:
    (tmp_path / "b.md").write_text("second\n")
    (tmp_path / "a.txt").write_text("first")
    assert [x() for x in readers(tmp_path)] == ["first", "second\n"]


@pytest.mark.parametrize("cache", [0, 1 << 20])
def test_parquet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: int) -> None:
    monkeypatch.setattr("components.data.parquet.CACHE_BYTES", cache)
    documents = texts(50)
    for name, part in (("a.parquet", documents[:20]), ("b.parquet", documents[20:])):
        table = pyarrow.table({"id": range(len(part)), "text": part})
        pyarrow.parquet.write_table(table, tmp_path / name, row_group_size=7)
    opened = open_files(str(tmp_path))
    assert isinstance(opened, Parquet)
    order = [*range(49, -1, -1), 0, 25, 49]
    assert [opened.document(i) for i in order] == [
        {"id": i % 20 if i < 20 else i - 20, "text": documents[i]} for i in order
    ]
    assert len(opened._cache) == (1 if cache == 0 else 8)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.csv", b"a,b", "{path}: unknown extension '.csv'; allowed: " + EXTENSIONS),
        ("x.jsonl", b"\n\n", "{path}: no records in 1 file(s); give a dataset that is not empty"),
        ("x.jsonl", b"", "{path}: no records in 1 file(s), all empty; give a dataset that is not empty"),
        ("x.txt", b"", "{path}: no records in 1 file(s), all empty; give a dataset that is not empty"),
        ("x.parquet", b"PAR1 no", "{path}: not a Parquet file, or damaged ("),
        ("folder.jsonl", None, "{path}: no data files in this folder; allowed extensions: " + EXTENSIONS),
    ],
)
def test_files_that_are_no_data(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    path = tmp_path / name
    path.mkdir() if content is None else path.write_bytes(content)
    with pytest.raises(DataError) as error:
        open_files(str(path))
    assert str(error.value).startswith(message.format(path=path))
    assert "damaged" in message or str(error.value) == message.format(path=path)


def test_a_file_that_is_a_folder_by_now(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "x.jsonl", ["a"])
    opened = open_files(str(path))
    assert isinstance(opened, RandomAccess)
    path.unlink()
    path.mkdir()
    how = "(was replaced by another|grew from 14 to [0-9]+ bytes)"  # it may have got the file's number
    with pytest.raises(DataError, match=rf"^{path}: {how} while the run read it; restore the file as it was$") as error:
        opened.document(0)
    assert not isinstance(error.value, BadRecord)


@pytest.mark.parametrize("path", ["no/such/folder/x.jsonl", "nothing", "no/*.jsonl", "./a/b"])
def test_no_such_path(path: str) -> None:
    with pytest.raises(DataError) as error:
        open_path(path, request())
    assert str(error.value) == (
        f"{path}: no such file or folder (looked in the current folder and the project's);"
        " check dataset_path, or the path of the source"
    )


def test_a_folder_of_several_kinds(tmp_path: Path) -> None:
    write_lines(tmp_path / "x.jsonl", ["a"])
    (tmp_path / "README.md").write_text("about")
    with pytest.raises(DataError) as error:
        open_files(str(tmp_path))
    assert str(error.value) == (
        f"{tmp_path}: holds files of several kinds (JSON lines and text); give a glob of one kind,"
        f" such as '{tmp_path}/*.jsonl'"
    )


def test_parquet_without_the_column(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"body": ["a"], "n": [1]}), path)
    with pytest.raises(DataError) as error:
        open_files(str(path), ("n", "text"))
    told = "no column 'text' (columns: body, n); set data.text_field, or the key of the source, to one"
    assert str(error.value) == f"{path}: {told}"


def test_parquet_gives_the_wanted_columns_as_python_objects(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    meta = {"lang": "en", "ids": [1, 2]}
    table = pyarrow.table({"messages": [chat, chat[:1]], "meta": [meta, None], "n": [1, 2]})
    pyarrow.parquet.write_table(table, path)
    whole, some = open_files(str(path)), open_files(str(path), ("n", "messages"))
    assert isinstance(whole, RandomAccess)
    assert isinstance(some, RandomAccess)
    assert whole.document(0) == {"messages": chat, "meta": meta, "n": 1}
    assert whole.document(1) == {"messages": chat[:1], "meta": None, "n": 2}
    assert some.document(1) == {"n": 2, "messages": chat[:1]}


def test_json_lines_give_whole_objects(tmp_path: Path) -> None:
    for name, pack in (("x.jsonl", bytes), ("x.jsonl.gz", gzip.compress)):
        (tmp_path / name).write_bytes(pack(b'{"q": "a", "n": [1, {"x": null}]}'))
        opened = open_files(str(tmp_path / name), ("q",))
        read = next(opened.records(0)) if isinstance(opened, Sequential) else partial(opened.document, 0)
        assert read() == {"q": "a", "n": [1, {"x": None}]}


def test_parquet_without_rows(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": pyarrow.array([], pyarrow.string())}), path)
    with pytest.raises(DataError) as error:
        open_files(str(path))
    assert str(error.value) == f"{path}: no rows in 1 file(s); give a dataset that is not empty"


def test_a_copy_has_the_same_fingerprint_and_an_edit_another(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        write_lines(tmp_path / folder / "x.jsonl", ["one"])
        write_lines(tmp_path / folder / "y.jsonl", ["two"])
    first, second = (open_files(str(tmp_path / x)).fingerprint for x in "ab")
    assert first == second
    assert {k: first[k] for k in ("files", "bytes")} == {"files": 2, "bytes": 32}
    assert {*first} == {"files", "bytes", "digest"}
    write_lines(tmp_path / "b" / "y.jsonl", ["three"])
    assert open_files(str(tmp_path / "b")).fingerprint != first


def test_a_saved_dataset(tmp_path: Path) -> None:
    hugging_face.Dataset.from_dict({"text": ["a", "b"], "n": [1, 2]}).save_to_disk(str(tmp_path / "saved"))
    path = str(tmp_path / "saved")
    for fields, expected in ((("text",), {"text": "b"}), (None, {"text": "b", "n": 2})):
        opened = open_path(path, request(fields=fields))
        assert isinstance(opened, RandomAccess)
        assert (len(opened), opened.document(1), place_of(opened, 1)) == (2, expected, f"{path}:2")
    with pytest.raises(DataError) as error:
        open_path(path, request(fields=("body",)))
    told = "no column 'body' (columns: text, n); set data.text_field, or the key of the source, to one"
    assert str(error.value) == f"{path}: {told}"
    with pytest.raises(DataError) as error:
        open_path(path, request(split="train"))
    assert str(error.value) == f"{path}: a saved dataset, which has no splits; leave out split = 'train'"


def test_a_split_of_a_saved_dataset(tmp_path: Path) -> None:
    parts = {x: hugging_face.Dataset.from_dict({"text": [x]}) for x in ("train", "test")}
    hugging_face.DatasetDict(**parts).save_to_disk(str(tmp_path / "saved"))
    opened = open_path(str(tmp_path / "saved"), request(split="test"))
    assert isinstance(opened, RandomAccess)
    assert opened.document(0) == {"text": "test"}
    with pytest.raises(DataError, match=r"name one of them: .*/saved/test, .*/saved/train$"):
        open_path(str(tmp_path / "saved"), request(split="dev"))


def test_splits_and_subsets_of_a_folder_are_told_by_names(tmp_path: Path) -> None:
    for name in ("en/train-00000-of-00001", "en/test", "de/train/x", "de/trainer"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        write_lines(tmp_path / f"{name}.jsonl", [name])

    def found(path: str, split: str | None, subset: str | None) -> list[str]:
        opened = open_files(path, split=split, subset=subset)
        assert isinstance(opened, RandomAccess)
        return [text_in(opened.document(i), "text", str) for i in range(len(opened))]

    folder = str(tmp_path)
    assert found(folder, "train", None) == ["de/train/x", "en/train-00000-of-00001"]
    assert found(folder, "train", "en") == ["en/train-00000-of-00001"]
    assert found(f"{folder}/*/*.jsonl", "test", None) == ["en/test"]
    with pytest.raises(DataError) as error:
        found(f"{folder}/de", "test", None)
    told = "no file or folder there is named after 'test' (files: train/x.jsonl, trainer.jsonl)"
    assert str(error.value) == f"{folder}/de: {told}"


def test_a_hugging_face_dataset_is_streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def load(path: str, **options: Any) -> hugging_face.IterableDataset:
        calls.append((path, options))
        return hugging_face.Dataset.from_dict({"text": ["a", "b", "c"]}).to_iterable_dataset()

    monkeypatch.setattr(hugging_face, "load_dataset", load)
    opened = datasets["c4_validation"](request())
    assert isinstance(opened, HubStream)
    records = [[x() for x in opened.records(i)] for i in (0, 2)]
    assert records == [[{"text": x} for x in y] for y in ("abc", "c")]
    assert place_of(list(opened.records(1))[1], 0) == "allenai/c4[validation]:3"
    assert calls[0] == ("allenai/c4", {"name": "en", "split": "validation", "streaming": True})
    unnamed = open_dataset("mine", request("owner/name"))
    assert unnamed.fingerprint == {"hub": "owner/name", "subset": None, "split": "train"}
    other = open_dataset("c4", request("owner/name", validation=True, split="dev", subset="de"))
    assert other.fingerprint == {"hub": "owner/name", "subset": "de", "split": "dev"}


def test_a_hugging_face_dataset_that_cannot_be_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(path: str, **options: Any) -> Iterator[Any]:
        raise ConnectionError("no route\nmore")

    monkeypatch.setattr(hugging_face, "load_dataset", load)
    with pytest.raises(DataError) as error:
        next(HubStream("owner/name", "train").records(0))
    assert str(error.value) == (
        "owner/name: no such file or folder, and as a Hugging Face dataset (split 'train') it cannot be read"
        " (no route); check the name and the network, or set dataset_path to a local copy"
    )


def test_a_local_copy_of_c4_is_split_by_file_names(tmp_path: Path) -> None:
    (tmp_path / "en").mkdir()
    write_lines(tmp_path / "en/c4-train.00000-of-00001.json.gz", ["train"])
    write_lines(tmp_path / "en/c4-validation.00000-of-00001.json.gz", ["held out"])
    for folder in (tmp_path, tmp_path / "en"):
        for name, text in (("c4", "train"), ("c4_validation", "held out")):
            opened = open_dataset(name, request(str(folder)))
            assert isinstance(opened, Sequential)
            assert [x() for x in opened.records(0)] == [{"text": text}]


def test_built_in_names() -> None:
    assert tuple(sorted(datasets)) == DATASETS
    test = open_dataset("c4_test", request())
    assert isinstance(test, RandomAccess)
    assert len(test) == 320
    assert isinstance(open_dataset("synthetic", request()), RowIndex)


def test_names_that_stand_for_nothing() -> None:
    allowed = ", ".join(DATASETS)
    with pytest.raises(ConfigError) as error:
        open_dataset("c4_tset", request())
    assert str(error.value) == (
        f"training.dataset = 'c4_tset': no such dataset; allowed: {allowed} (did you mean 'c4_test'?);"
        " or any name together with dataset_path"
    )
    with pytest.raises(ConfigError, match=r"^validation\.dataset = 'zzz': no such dataset; allowed:"):
        open_dataset("zzz", request(validation=True))
    with pytest.raises(ConfigError) as error:
        open_dataset("synthetic", request("x"))
    assert str(error.value) == ("dataset_path = 'x': the dataset 'synthetic' is drawn, not read; remove the path")
    with pytest.raises(ConfigError) as error:
        open_dataset("synthetic", request(split="x"))
    assert str(error.value) == "split = 'x': the dataset 'synthetic' has none; leave it out"
    with pytest.raises(ConfigError) as error:
        open_dataset("pystdlib", request(subset="x"))
    own = "the dataset of the standard library has names of its own for its splits"
    assert str(error.value) == f"subset = 'x': {own}; leave it out"


def test_relative_paths_are_found_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert len(readers("tests/assets/c4_test")) == 320
    assert len(readers("tests/assets/c4_test/*-0.jsonl")) == 160
    (tmp_path / "tests/assets/c4_test").mkdir(parents=True)
    write_lines(tmp_path / "tests/assets/c4_test/x.jsonl", ["mine"])
    assert [x() for x in readers("tests/assets/c4_test")] == ["mine"]


def test_the_standard_library_of_this_python() -> None:
    train, held_out = open_stdlib("train"), open_stdlib("validation")
    root = Path(sysconfig.get_path("stdlib"))
    names = [[x.location.removeprefix(f"{root}/") for x in split.files] for split in (train, held_out)]
    assert set(names[0]).isdisjoint(names[1])
    assert len(names[1]) == (len(names[0]) + len(names[1])) // 20
    together = sorted(names[0] + names[1])
    assert together[19::20] == names[1]
    assert {"ast.py", "json/decoder.py", "asyncio/base_events.py"} <= set(together)
    folders = {part for name in together for part in name.split("/")[:-1]}
    assert folders.isdisjoint({"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"})
    assert train.fingerprint["python"] == platform.python_version()
    assert (train.fingerprint["split"], held_out.fingerprint["split"]) == ("train", "validation")
    assert train.document(names[0].index("ast.py")).startswith('"""\n    ast\n')


def test_a_standard_library_with_an_unreadable_file(tmp_path: Path) -> None:
    for i in range(20):
        (tmp_path / f"m{i:02}.py").write_bytes(b"\xe9" if i == 3 else b"x = 1")
    for name in (
        "test/a.py",
        "lib2to3/tests/b.py",
        "idlelib/idle_test/c.py",
        "site-packages/d.py",
        "_sysconfigdata_x.py",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("no")
    train = open_stdlib("train", tmp_path)
    assert [x.name for x in train.files] == [f"m{i:02}.py" for i in range(19)]
    with pytest.raises(BadRecord) as error:
        train.document(3)
    assert error.value.harmless


def test_a_python_without_sources(tmp_path: Path) -> None:
    with pytest.raises(DataError) as error:
        open_stdlib("train", tmp_path)
    assert str(error.value) == (
        f"{tmp_path}: only 0 source files of the standard library; install them, or choose another dataset"
    )


def test_the_assets_are_what_their_script_writes(tmp_path: Path) -> None:
    script = [sys.executable, "scripts/make_assets.py", "--out", str(tmp_path)]
    subprocess.run(script, check=True, capture_output=True, env={**os.environ, "PYTHONPATH": "."})
    for name in ("part-0.jsonl", "part-1.jsonl"):
        assert (tmp_path / name).read_bytes() == Path("tests/assets/c4_test", name).read_bytes()
        assert all(list(json.loads(x)) == ["text"] for x in (tmp_path / name).read_text().splitlines())


def test_imports_are_light() -> None:
    heavy = ("datasets", "pandas", "transformers", "pyarrow", "zstandard", "torch._dynamo")
    code = f"import sys, components.data.build; print([x for x in {heavy} if x in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout == "[]\n"
    code = "import sys, components.data.names; print([x for x in sys.modules if x in ('torch', 'numpy')])"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize("extension", [".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet", ".txt"])
def test_an_empty_file_among_others_gives_nothing_and_is_told(
    extension: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(logger, "propagate", True)
    caplog.set_level(logging.INFO, logger.name)
    full = tmp_path / f"full{extension}"
    if extension == ".parquet":
        pyarrow.parquet.write_table(pyarrow.table({"text": ["a"]}), full)
    elif extension == ".txt":
        full.write_text("a")
    else:
        write_lines(full, ["a"])
    alone = open_files(str(full)).fingerprint
    for name in ("before", "very"):
        (tmp_path / f"{name}{extension}").touch()
    assert [x() for x in readers(tmp_path)] == ["a"]
    assert open_files(str(tmp_path)).fingerprint == alone
    empty = ", ".join(f"{tmp_path}/{name}{extension}" for name in ("before", "very"))
    assert caplog.messages[0] == f"{tmp_path}: nothing is read of 2 empty file(s): {empty}"
