"""The loader's benchmark reads what it says it reads."""

import json
import re
from pathlib import Path

import pytest

from components.data.token_files import open_tokens
from components.data.tokenizer import load_tokenizer
from scripts import measure_loader
from scripts.measure_loader import CASES, TEXT, TOKENIZER, TOKENS, job_of, loader_of, main, prepare


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(measure_loader, "CHARACTERS", 60_000)
    prepare(tmp_path)
    return tmp_path


def test_each_case_reads_the_text_as_its_name_says(folder: Path) -> None:
    tokenizer = load_tokenizer(TOKENIZER)
    seen = {}
    for name, (file, data) in CASES.items():
        job = job_of(folder, file, data, 0, ["--training.seq_len=64", "--training.local_batch_size=8"])
        loader = loader_of(job, tokenizer)
        rows = next(loader.steps()).batch
        assert rows.tokens.shape == (8, 64)
        seen[name] = (loader.state_dict([])["kind"], job.data.order, job.data.packing)
    assert seen == {
        "indexed, native": ("indexed", "native", "concat"),
        "indexed, megatron": ("indexed", "megatron", "concat"),
        "indexed, best_fit": ("streamed", "native", "best_fit"),
        "jsonl, concat": ("streamed", "native", "concat"),
        "jsonl, best_fit": ("streamed", "native", "best_fit"),
        "jsonl, padded": ("streamed", "native", "padded"),
    }


def test_both_forms_hold_the_same_text(folder: Path) -> None:
    tokenizer, tokens = load_tokenizer(TOKENIZER), open_tokens(str(folder / TOKENS))
    texts = [json.loads(line)["text"] for line in (folder / TEXT).read_text().splitlines()]
    assert sum(map(len, texts)) > 60_000
    assert [tokens.document(i).tolist() for i in range(len(tokens))] == [
        [*tokenizer.encode(text), tokenizer.eos_id] for text in texts
    ]


def test_it_prints_a_line_for_each_case(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure_loader, "CHARACTERS", 60_000)
    words = ["--rounds", "2", "--seconds", "0.05", "--workers", "0", "--only", "concat", "native"]
    assert main([*words, "--training.seq_len=64"]) == 0
    _, _, *lines = capsys.readouterr().out.splitlines()
    assert [re.sub(r"[\d,]*\d", "N", line) for line in lines] == [
        "| indexed, native | N | N | N | N |",
        "| jsonl, concat | N | N | N | N |",
    ]
