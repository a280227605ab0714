"""scripts/preprocess_data.py as one calls it: what it prints, and its exit codes."""

import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from scripts.preprocess_data import main
from tests.components.data.preprocessing import ROOT, TOKENIZER, corpus, expected, lines, write, written

RECORDS = corpus(40)


def call(*arguments: str | Path) -> int:
    return main([str(x) for x in arguments])


def run(tmp_path: Path, *arguments: str | Path) -> int:
    output = ("--output", tmp_path / "out", "--tokenizer", TOKENIZER)
    return call("run", *output, *arguments)


def test_run_tells_what_it_wrote(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(lines(RECORDS[:9]) + b"x\n" + lines(RECORDS[9:]))
    assert run(tmp_path, "--input", file, "--workers", "0", "--on-bad-record", "skip") == 0
    bin_, idx = expected(RECORDS)
    assert written(tmp_path / "out_text_document") == (bin_, idx)
    report = json.loads((tmp_path / "out.report.json").read_text())
    empty = sum(not x["text"] for x in RECORDS)
    told = capsys.readouterr()
    assert told.out.splitlines()[:3] == [
        f"{tmp_path}/out_text_document: 40 documents, {empty} of them empty; {len(bin_) // 2:,} tokens, {len(bin_):,}"
        " bytes (uint16)",
        "dropped 1 records: 1 not valid JSON; the first of them:",
        f"  {file}:10:1: not valid JSON (Expecting value)",
    ]
    assert told.out.splitlines()[3].startswith(f"{report['seconds']:,.1f} s")
    assert told.err == ""


def test_run_with_workers_from_standard_input_in_another_folder(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "scripts/preprocess_data.py"), "run", "--input", "-", "--output", "out"]
    command += ["--tokenizer", str(TOKENIZER), "--keys", "text,title", "--workers", "2", "--no-append-eod"]
    done = subprocess.run(command, input=lines(RECORDS), capture_output=True, cwd=tmp_path, env=os.environ | {})
    assert (done.returncode, done.stderr) == (0, b"")
    for key in ("text", "title"):
        assert written(tmp_path / f"out_{key}_document") == expected(RECORDS, key, eod=None)


def test_wrong_input_is_one_line_and_exit_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(tmp_path / "a.jsonl", RECORDS)
    assert run(tmp_path, "--input", file, "--workers", "0", "--keys", "body") == 2
    assert capsys.readouterr().err == (
        f"error: {file}:1:1: no field 'body' (fields: 'id', 'text', 'title'; --keys names those to encode); mend the"
        " record, or drop such records with --on-bad-record skip\n"
    )
    assert run(tmp_path, "--input", file, "--workers", "0") == 0  # nothing had been written
    assert written(tmp_path / "out_text_document") == expected(RECORDS)
    with pytest.raises(SystemExit) as caught:
        run(tmp_path, "--input", file, "--workers", "-1")
    assert caught.value.code == 2
    assert "argument --workers: '-1' is no number from 0 on" in capsys.readouterr().err
    assert run(tmp_path, "--input", file, "--workers", "99999999999") == 2
    assert capsys.readouterr().err == (
        "error: --workers 99999999999: allowed are 0 to 1024; more than cores gain nothing\n"
    )


def test_no_workers_are_this_process_and_none_at_all_over_ray(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("components.data.preprocess.job.Pool", None)
    file = write(tmp_path / "a.jsonl", RECORDS)
    assert run(tmp_path, "--input", file, "--workers", "0") == 0
    assert written(tmp_path / "out_text_document") == expected(RECORDS)
    capsys.readouterr()
    assert run(tmp_path, "--input", file, "--workers", "0", "--ray") == 2
    assert capsys.readouterr().err == (
        "error: --workers 0: with --ray it is the number of tasks at a time; leave it out for all CPUs\n"
    )
    with pytest.raises(SystemExit):
        call("run", "--help")
    assert "0: everything in this process, one chunk after the other" in " ".join(capsys.readouterr().out.split())


def test_pieces_and_looks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(tmp_path / "a.jsonl", RECORDS)
    prefix = tmp_path / "out"
    assert run(tmp_path, "--input", file, "--workers", "0", "--plain") == 0
    tokens = len(expected(RECORDS)[0]) // 2
    sizes = [len(expected(RECORDS[i : i + 25])[0]) // 2 for i in (0, 25)]
    capsys.readouterr()
    assert call("split", prefix, "--output", tmp_path / "p", "--documents", "25") == 0
    pieces = [f"{tmp_path}/p_{i:05d}" for i in range(2)]
    assert capsys.readouterr().out == (
        f"{pieces[0]}: 25 documents, {sizes[0]:,} tokens\n{pieces[1]}: 15 documents, {sizes[1]:,} tokens\n"
    )
    assert call("merge", *pieces, "--output", tmp_path / "again") == 0
    assert capsys.readouterr().out == f"{tmp_path}/again: 40 documents, {tokens:,} tokens\n"
    assert written(tmp_path / "again") == written(prefix)
    assert call("split", prefix, "--output", tmp_path / "s", "--shares", "3,1", "--names", "a,b") == 0
    assert capsys.readouterr().out.startswith(f"{tmp_path}/s_a: 30 documents, ")
    assert call("stats", prefix, "--json", "--validate", "--tokenizer", TOKENIZER) == 0
    assert json.loads(capsys.readouterr().out)["tokens"] == tokens
    assert call("head", prefix, "--documents", "1") == 0
    assert capsys.readouterr().out == "document 0: 0 tokens: \n"
    assert call("stats", tmp_path / "nothing") == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path}/nothing.idx: no such file; ")


def test_a_terminal_gets_a_progress_bar(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", RECORDS * 40)
    command = [sys.executable, str(ROOT / "scripts/preprocess_data.py"), "run", "--input", str(file), "--output", "out"]
    master, slave = pty.openpty()
    done = subprocess.run([*command, "--tokenizer", str(TOKENIZER), "--workers", "0"], cwd=tmp_path, stderr=slave)
    os.close(slave)
    shown = os.read(master, 1 << 16).decode()
    os.close(master)
    assert done.returncode == 0
    assert "1,600 documents, " in shown
    assert "100%" in shown


def test_importing_the_tool_brings_no_torch() -> None:
    program = "import sys, components.data.preprocess.job, components.data.preprocess.looking, scripts.preprocess_data"
    found = subprocess.run(
        [sys.executable, "-c", f"{program}; print('torch' in sys.modules)"], capture_output=True, text=True, cwd=ROOT
    )
    assert found.stdout == "False\n"
