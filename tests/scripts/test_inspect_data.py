"""scripts/inspect_data.py: it shows the rows that a job trains on, from any step, and refuses what training refuses."""

import json
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from components.data.token_writer import IndexedWriter
from tests.components.data.corpus import tokenizer, write_lines
from tests.trainer.runs import TINY, train
from trainer.config.load import load_job

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = ["def x", "return x\nself", "im", 'print("<script>alert(1)</script>")']
JOB = """\
[job]
description = "a tiny job"
[model]
name = "llama3"
flavor = "debugmodel"
[training]
dataset = "words"
dataset_path = "{path}"
seq_len = 8
local_batch_size = 2
[data]
shuffle = false
[validation]
dataset = "held out"
dataset_path = "{path}"
seq_len = 8
local_batch_size = 2
steps = -1
"""


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A TOML over a corpus of four documents."""
    for name in ("NGPU", "NNODES", "CONFIG_FILE", "COMM_MODE"):
        monkeypatch.delenv(name, raising=False)
    path = write_lines(tmp_path / "words.jsonl", DOCUMENTS)
    file = tmp_path / "job.toml"
    file.write_text(JOB.format(path=path))
    return file


def inspect(*arguments: str | Path) -> int:
    return runpy.run_path("scripts/inspect_data.py")["main"]([str(x) for x in arguments])


def shown(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    capsys.readouterr()
    code = inspect(*arguments)
    told = capsys.readouterr()
    assert code == 0, told.err
    return told.out


def rows(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> list[dict[str, Any]]:
    return json.loads(shown(capsys, *arguments, "--json"))["rows"]


def refused(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    capsys.readouterr()
    assert inspect(*arguments) == 2
    told = capsys.readouterr()
    assert told.out == ""
    return told.err


TEXT = """\
training data of a tiny job
a loss is taken at this text; ⟪at this none⟫; →only predicted←; ↵ ends a line

step 1, row 0: 8 places, 3 documents, 6 trained, 0 padding
── document 0: words, {path}:1: 4 tokens, all of it
⟪<|begin_of_text|>⟫def x<|end_of_text|>
── document 1: words, {path}:3: 3 tokens, all of it
⟪<|begin_of_text|>⟫im<|end_of_text|>
── document 2: words, {path}:1: tokens 0 to 0 of 4
⟪<|begin_of_text|>⟫→def←

step 1, row 1: 8 places, 2 documents, 7 trained, 0 padding
── document 0: words, {path}:2: 7 tokens, all of it
⟪<|begin_of_text|>⟫return x↵
self<|end_of_text|>
── document 1: words, {path}:4: tokens 0 to 0 of 18
⟪<|begin_of_text|>⟫→print←

8 rows, 64 places
  tokens             64   100.0%
  padding             0     0.0%
  trained            52    81.2%
sources
  source  tokens  documents  trained  share of tokens  wanted  since the start
  words       64         12    81.2%           100.0%     n/a               64
lengths in tokens of documents that begin in these rows
              2–3         4 #######################
              4–7         7 ########################################
             8–15         0
            16–31         1 ######
"""


def test_the_text_of_a_tiny_corpus(job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys, job, "--rows=2", "--stats-rows=8")
    assert text == TEXT.format(path=job.with_name("words.jsonl"))


def test_rows_are_those_of_training(job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from components.data.build import build_loader

    arguments = ["--data.shuffle=true", "--data.document_mask=true", "--debug.seed=5"]
    config = load_job([f"--job.config_file={job}", *arguments], {}).job
    loader = build_loader(config, tokenizer=tokenizer(), data_rank=0, data_degree=1, vocab_size=2048)
    found = rows(capsys, job, *arguments, "--rows=10")
    steps = [step.batch for step, _ in zip(loader, range(5), strict=False)]
    for name in ("tokens", "labels", "positions"):
        wanted = torch.cat([getattr(batch, name) for batch in steps])
        assert [row[name] for row in found] == wanted.tolist()
    assert [(row["step"], row["row"]) for row in found] == [(n // 2 + 1, n % 2) for n in range(10)]
    assert found[0]["documents"][0]["source"] == "words"


@pytest.mark.parametrize("dataset", ["words", "synthetic"])
def test_from_a_step(job: Path, capsys: pytest.CaptureFixture[str], dataset: str) -> None:
    arguments = [job, f"--training.dataset={dataset}"]
    if dataset == "synthetic":
        arguments.append("--training.dataset_path=none")
    every = rows(capsys, *arguments, "--rows=12")
    assert rows(capsys, *arguments, "--rows=4", "--start-step=5") == every[8:12]
    assert rows(capsys, *arguments, "--rows=3", "--start-step=1") == every[:3]


def test_numbered_rows_are_found_at_once(job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = (job, "--training.dataset=synthetic", "--training.dataset_path=none", "--start-step=1000000000000")
    (row,) = rows(capsys, *arguments, "--rows=1", "--stats-rows=0")
    assert row["step"] == 10**12


def test_a_batch_that_follows_the_ranks(
    job: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NGPU", "3")
    found = rows(capsys, job, "--rows=7")
    assert [(row["step"], row["row"]) for row in found] == [*((1, r) for r in range(6)), (2, 0)]


def test_from_a_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keys = ("--checkpoint.enable=true", "--checkpoint.interval=2", "--training.steps=2")
    train(1, tmp_path, *keys)
    folder = tmp_path / "checkpoint/step-2"
    every = rows(capsys, *TINY, "--rows=60")
    assert rows(capsys, *TINY, "--checkpoint", folder, "--rows=12") == every[24:36]
    assert rows(capsys, *TINY, "--checkpoint", folder, "--rows=12", "--start-step=5") == every[48:60]
    assert refused(capsys, *TINY, "--checkpoint", folder, "--start-step=2") == (
        "error: --start-step 2: the checkpoint is of step 2; take 3 or more\n"
    )
    for keys, had in ((), 12 * 24), (("--start-step=5",), 36 * 24):  # no cursor knows of what is begun, as all is here
        after = json.loads(shown(capsys, *TINY, "--checkpoint", folder, *keys, "--stats-rows=12", "--json"))["survey"]
        assert [*after["served"].values()] == [had]
    assert "the saved loader state belongs to other data: seq_len was 24, is 16" in refused(
        capsys, *TINY, "--training.seq_len=16", "--checkpoint", folder
    )


def test_a_validation_set(job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert shown(capsys, job, "--validation", "--rows=1", "--stats-rows=0").startswith(
        "validation set held out of a tiny job\n"
    )
    assert rows(capsys, job, "--validation", "held out") == rows(capsys, job, "--validation")
    assert refused(capsys, job, "--validation", "other") == (
        "error: --validation other: no such validation set; there are: held out\n"
    )
    every = json.loads(shown(capsys, job, "--validation", "--json"))
    assert every["survey"]["sources"]["held out"]["documents"] == 4  # once, and then the data end


@pytest.mark.parametrize("packing", ["concat", "best_fit", "padded"])
def test_what_the_job_has_had_is_what_the_rows_hold(
    job: Path, capsys: pytest.CaptureFixture[str], packing: str
) -> None:
    """From step 1 on, though a cursor knows only of documents, or of windows of them, that are done."""
    for arguments in ((), ("--validation",)):
        found = json.loads(shown(capsys, job, *arguments, f"--data.packing={packing}", "--stats-rows=3", "--json"))
        (tokens,) = (x["tokens"] for x in found["survey"]["sources"].values())
        assert [*found["survey"]["served"].values()] == [tokens]
        assert tokens == 24 - found["survey"]["padding"]


def test_what_the_job_has_had_before_the_rows(job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for packing in ("concat", "best_fit"):
        arguments = (job, f"--data.packing={packing}", "--training.seq_len=17")
        whole = json.loads(shown(capsys, *arguments, "--stats-rows=8", "--json"))["survey"]
        for unit, wanted in (("tokens", whole["served"]), ("documents", {"words": documents(whole)})):
            keys = (f"--data.unit={unit}", "--start-step=4", "--stats-rows=2", "--json")
            last = json.loads(shown(capsys, *arguments, *keys))["survey"]
            assert last["sources"]["words"]["tokens"] < 40
            assert last["served"] == wanted


def documents(survey: dict[str, Any]) -> int:
    """That begin in the rows."""
    return survey["sources"]["words"]["documents"]


def test_a_page(job: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    page = tmp_path / "rows.html"
    assert shown(capsys, job, "--html", page, "--rows=6") == ""
    text = page.read_text(encoding="utf-8")
    assert "<script" not in text
    assert text.startswith("<!DOCTYPE html>\n")


def test_a_page_that_cannot_be_written(job: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """It is told before any row is made, of which this corpus has none; a page that is there is kept."""
    job.with_name("words.jsonl").write_text("no JSON\n")
    mend = "; give a file in a folder that is there"
    for place, why in (
        (tmp_path / "none/x.html", "No such file or directory"),
        (tmp_path, "Is a directory"),
        (job / "x.html", "Not a directory"),
    ):
        assert refused(capsys, job, "--html", place) == f"error: --html {place}: cannot be written: {why}{mend}\n"
    for file in (tmp_path / "old.html", tmp_path / "new.html"):
        if file.name == "old.html":
            file.write_text("a page")
        assert refused(capsys, job, "--html", file).startswith(f"error: {job.with_name('words.jsonl')}:1:1: ")
    assert (tmp_path / "old.html").read_text() == "a page"
    assert not (tmp_path / "new.html").exists()


def test_a_line_for_each_token(job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = shown(capsys, job, "--tokens", "--rows=1", "--stats-rows=0").splitlines()
    assert lines[2:7] == [
        "step 1, row 0: 8 places, 3 documents, 6 trained, 0 padding",
        "  place  position    token    label  text",
        f"── document 0: words, {job.with_name('words.jsonl')}:1: 4 tokens, all of it",
        "      0         0        0      481  '<|begin_of_text|>'",
        "      1         1      481      843  'def'",
    ]


def test_what_training_refuses(job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from trainer.command import main

    for argument in ("--training.seq_length=8", "--training.seq_len=0", "--model.flavor=none", "--nonsense"):
        assert main(["check", str(job), argument], {}) == 2
        told = capsys.readouterr().err
        assert refused(capsys, job, argument) == told
    with pytest.raises(SystemExit) as caught:
        inspect(job, "--rows=-1")
    assert caught.value.code == 2
    assert refused(capsys, job, "--data.on_end=stop", "--start-step=9", "--training.seq_len=4") == (
        "error: --start-step 9: the data end after step 1\n"
    )
    job.with_name("words.jsonl").write_text('{"text": "a"}\n{"no": 1}\n')
    assert f"{job.with_name('words.jsonl')}:2:1: no field 'text'" in refused(capsys, job)


MIXTURE = """\
[job]
description = "a mixture"
[model]
name = "llama3"
flavor = "debugmodel"
[training]
seq_len = 24
local_batch_size = 1
[data]
packing = "padded"
shuffle = false
[[data.sources]]
name = "chats"
path = "{folder}/chats.jsonl"
kind = "chat"
chat_template = "{folder}/template.jinja"
[[data.sources]]
name = "words"
path = "{folder}/words.jsonl"
weight = 3
fim_rate = {rate}
[[data.sources]]
name = "pairs"
path = "{folder}/pairs.jsonl"
kind = "preference"
"""
CHAT = [{"role": "user", "content": "x y"}, {"role": "assistant", "content": "def x"}]
PAIR = {"prompt": "x", "chosen": "[red]y", "rejected": "<b>\x1b"}
TEMPLATE = """\
{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor -%}
{% if add_generation_prompt %}assistant: {% endif %}"""


def mixture(job: Path, rate: float = 0.0) -> Path:
    """A TOML with a chat and preference pairs beside the text."""
    folder = job.parent
    (folder / "chats.jsonl").write_text(json.dumps({"messages": CHAT}) + "\n")
    (folder / "pairs.jsonl").write_text(json.dumps(PAIR) + "\n")
    (folder / "template.jinja").write_text(TEMPLATE)
    file = folder / "mixture.toml"
    file.write_text(MIXTURE.format(folder=folder, rate=rate))
    return file


def test_chats_and_mixtures(job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, found = mixture(job), []
    for row in rows(capsys, file, "--rows=12"):
        found.append(row["documents"][0]["source"])
        if found[-1] == "chats":
            ids = [label for label in row["labels"] if label != -100]
            assert tokenizer().decode(ids) == " def x<|end_of_text|>"
    assert {*found} == {"chats", "words"}
    assert json.loads(shown(capsys, file, "--json"))["survey"]["served"].keys() == {"chats", "words"}
    text = shown(capsys, file, "--rows=12", "--stats-rows=0")
    place = job.with_name("chats.jsonl")
    assert f"── document 0: chats, {place}:1: " in text
    assert "\n⟪user: x y<|end_of_text|>assistant:⟫ def x<|end_of_text|>\n" in text
    assert "  pairs  " not in shown(capsys, file, "--rows=0")


PAIRS = """\
┡━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━╇━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━┩
│ ⟪<|begin_of_text|>x↵                                      │ ⟪<|begin_of_text|>x↵                                     │
│ ⟫[red]y<|end_of_text|>                                    │ ⟫<b>{escape}<|end_of_text|>                              │
└───────────────────────────────────────────────────────────┴──────────────────────────────────────────────────────────┘
""".replace("{escape}<|end_of_text|>", "\\x1b<|end_of_text|>    ")


def test_pairs_are_shown_side_by_side(job: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file, page = mixture(job), tmp_path / "pairs.html"
    text = shown(capsys, file, "--rows=1")
    assert text.endswith(PAIRS)
    assert f"pair 0: pairs, {job.with_name('pairs.jsonl')}:1" in text
    (pair,) = json.loads(shown(capsys, file, "--json"))["pairs"]
    assert tokenizer().decode(pair["rejected"]["tokens"]) == "<|begin_of_text|>x\n<b>\x1b<|end_of_text|>"
    shown(capsys, file, "--html", page)
    assert '<table class="pair"><tr><th>chosen: ' in page.read_text()
    only = file.read_text().partition("[[data.sources]]")[0] + file.read_text().rpartition("[[data.sources]]")[1]
    file.write_text(only + file.read_text().rpartition("[[data.sources]]")[2])
    assert shown(capsys, file).endswith(PAIRS)  # without any rows


def test_pairs_of_a_validation_set(job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By its name, or as the first set; only the pairs that are held out."""
    file, place = mixture(job), job.with_name("held.jsonl")
    place.write_text("".join(json.dumps({**PAIR, "chosen": f"answer {i}"}) + "\n" for i in range(10)))
    words = f'[validation]\n[[validation.sources]]\npath = "{job.parent}/words.jsonl"\n'
    held = f'[[validation.sources]]\npath = "{place}"\nkind = "preference"\nsplit = "7,3"\n'
    plain = file.read_text()
    file.write_text(plain + words + held)
    found = json.loads(shown(capsys, file, "--validation", "held", "--rows=5", "--json"))
    assert (found["rows"], found["survey"]) == ([], None)
    assert [(pair["source"], pair["where"]) for pair in found["pairs"]] == [
        ("held", f"{place}:{i}") for i in (8, 9, 10)
    ]
    assert tokenizer().decode(found["pairs"][0]["chosen"]["tokens"]) == "<|begin_of_text|>x\nanswer 7<|end_of_text|>"
    text = shown(capsys, file, "--validation", "held", "--rows=1")
    assert text.startswith("validation set held of a mixture\n")
    assert f"pair 0: held, {place}:8" in text
    assert json.loads(shown(capsys, file, "--validation", "--json"))["pairs"] == []
    assert json.loads(shown(capsys, file, "--validation.enable", "--json"))["pairs"][0]["source"] == "pairs"
    file.write_text(plain + held)
    assert shown(capsys, file, "--validation", "--rows=1") == text


def test_fim_of_a_job(job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = "error: source 'words': fim_rate needs tokens that stand before prefix, suffix and middle"
    assert refused(capsys, mixture(job, 0.5)).startswith(message)
    file = mixture(job, 1.0)
    file.write_text(file.read_text().replace("fim_rate", 'fim_tokens = ["Z", "Q", "J"]\nfim_rate'))
    ids = [tokenizer().token_id(name) for name in "ZQJ"]
    words = [row for row in rows(capsys, file, "--rows=30") if row["documents"][0]["source"] == "words"]
    assert len(words) > 15
    assert all(row["tokens"][1] == ids[0] for row in words)


@pytest.mark.parametrize("order", ["native", "megatron"])
def test_documents_of_token_files(job: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path, order: str) -> None:
    documents = [list(range(start, start + length)) for start, length in ((10, 5), (100, 13), (200, 30), (300, 2))]
    with IndexedWriter(tmp_path / "ids", np.uint16) as writer:
        for ids in documents:
            writer.add_document(np.array(ids))
    keys = (f"--training.dataset_path={tmp_path / 'ids'}", f"--data.order={order}", "--training.steps=6")
    keys = (*keys, f"--data.cache_folder={tmp_path / 'cache'}")
    found = rows(capsys, job, *keys, "--rows=12")
    later = json.loads(shown(capsys, job, *keys, "--start-step=4", "--stats-rows=5", "--json"))["survey"]
    assert later["served"] == {"words": 6 * 8 + 5 * 8}
    seen = set()
    for row in found:
        for piece in row["documents"]:
            number = int(piece["where"].rpartition(" ")[2])
            seen.add(number)
            inside = documents[number][piece["offset"] : piece["offset"] + piece["stop"] - piece["start"]]
            assert row["tokens"][piece["start"] : piece["stop"]] == inside
            assert piece["length"] == len(documents[number])
    assert seen == {0, 1, 2, 3}


def test_as_a_script(job: Path) -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "scripts/inspect_data.py", job, "--rows=1", "--stats-rows=0"],
        capture_output=True,
        text=True,
        cwd=job.parent,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("training data of a tiny job\n")
