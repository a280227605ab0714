"""How fast text becomes token files, against what the tokenizer alone reaches on the same cores.

    python scripts/measure_preprocess.py --megabytes 100 --rounds 3

The corpus is the standard library's source as JSON lines, repeated. Three programs encode it: `encode_batch_fast`
alone, in one process with a thread for each core, texts in memory, ids not taken out; the same in a process of one
thread for each core; and `preprocess_data.py run` with a worker for each core, from its start to its end. They take
turns second by second, the others being stopped meanwhile, so that what else the machine does concerns all alike.
Prints tokens per second of the clock and of the processors (medians of the rounds), their ratios to those of the first
two programs (medians of each round's), and the memory of the largest process.
"""

import argparse
import json
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs as a script, from any folder

from components.data.documents import BadRecord
from components.data.stdlib import open_stdlib
from components.data.tokenizer import load_tokenizer

ROOT = Path(__file__).resolve().parents[1]
TOKENIZER = ROOT / "tests/assets/tokenizer"
FOLDER = "tokenizer"  # its copy beside the corpus, where all programs look
BATCH = 4 << 20  # characters; larger ones are not faster, and take a hundred times their size of memory
NAMES = ("encode_batch_fast, threads", "encode_batch_fast, processes", "preprocess_data.py run")
TURN, LOOK = 1.0, 0.01  # seconds


class Taken(NamedTuple):
    """What a program took to encode the corpus."""

    clock: float
    processors: float
    tokens: int
    peak: float
    """MiB of the largest process."""


def write_corpus(path: Path, size: int, one_line: bool) -> None:
    """Files of the standard library as JSON lines, again and again until there are `size` bytes; or all as one line."""
    source, lines = open_stdlib("train"), []
    for i in range(len(source)):
        try:
            lines.append(json.dumps({"text": source.document(i)}) + "\n")
        except BadRecord:
            continue
    with path.open("w", encoding="utf-8") as file:
        number = 0
        file.write('{"text": "' if one_line else "")
        while file.tell() < size:
            line = lines[number % len(lines)]
            file.write(line[len('{"text": "') : -len('"}\n')] if one_line else line)
            number += 1
        file.write('"}\n' if one_line else "")


def alone(path: Path, share: int, of: int, begin: Path) -> tuple[float, int]:
    """Encode every `of`-th batch; seconds of the processor, and tokens. Marks the file `begin` when texts are read."""
    os.environ["TOKENIZERS_PARALLELISM"] = "true" if of == 1 else "false"
    backend = load_tokenizer(str(path.parent / FOLDER))._backend
    batches, held = [[]], 0
    with path.open(encoding="utf-8") as file:
        for line in file:
            batches[-1].append(json.loads(line)["text"])
            held += len(line)
            if held >= BATCH:
                batches.append([])
                held = 0
    begin.touch()
    before, tokens = time.process_time(), 0
    for batch in batches[share::of]:
        tokens += sum(map(len, backend.encode_batch_fast(batch, add_special_tokens=False)))
    return time.process_time() - before, tokens


def yardstick(path: Path, processes: int) -> None:
    """Encode alone; seconds of the processors and tokens go to a file beside the corpus."""
    begin = path.with_suffix(f".begin{processes}")
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        spans = pool.starmap(alone, [(path, i, processes, begin) for i in range(processes)], chunksize=1)
    path.with_suffix(f".alone{processes}").write_text(json.dumps([sum(x) for x in zip(*spans, strict=True)]))


class Program:
    """A program that runs only when it has its turn."""

    def __init__(self, command: list[str], begin: Path | None = None) -> None:
        self._begin, self.clock = begin, 0.0
        self.used: resource.struct_rusage | None = None
        if begin is not None:
            begin.unlink(missing_ok=True)
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True)
        os.killpg(self._process.pid, signal.SIGSTOP)

    @property
    def processors(self) -> float:
        """Seconds of them, all processes together."""
        return self.used.ru_utime + self.used.ru_stime if self.used else 0.0

    @property
    def peak(self) -> float:
        """MiB of the largest process."""
        return self.used.ru_maxrss / 1024 if self.used else 0.0

    def turn(self) -> bool:
        """Go on for a second; whether it is not over."""
        if self.used is not None:
            return False
        os.killpg(self._process.pid, signal.SIGCONT)
        until = time.time() + TURN
        while (now := time.time()) < until:
            time.sleep(LOOK)
            pid, status, used = os.wait4(self._process.pid, os.WNOHANG)  # `used`: with all of its children
            if self._begin is None or self._begin.exists():
                self.clock += time.time() - now
            if pid:
                self.used = used
                if status:
                    raise SystemExit(f"{self._process.args}: ended with status {status}")
                return False
        os.killpg(self._process.pid, signal.SIGSTOP)
        return True


def tool(path: Path, workers: int) -> list[str]:
    """The command that is measured; without end tokens, which the yardsticks have not."""
    command = [sys.executable, str(ROOT / "scripts/preprocess_data.py"), "run", "--input", str(path), "--overwrite"]
    command += ["--output", str(path.with_suffix("")), "--tokenizer", str(path.parent / FOLDER), "--no-append-eod"]
    return [*command, "--workers", str(workers)]


def measure(path: Path, workers: int) -> list[Taken]:
    """One round."""
    counts = (1, workers)
    own = [[sys.executable, __file__, "--alone", str(path), "--workers", str(x)] for x in counts]
    programs = [Program(x, path.with_suffix(f".begin{n}")) for x, n in zip(own, counts, strict=True)]
    programs.append(Program(tool(path, workers)))
    while any(running := [x.turn() for x in programs]):
        running.clear()
    found = [json.loads(path.with_suffix(f".alone{n}").read_text()) for n in counts]
    tokens = Path(f"{path.with_suffix('')}_text_document.bin").stat().st_size // 2
    found.append([programs[2].processors, tokens])
    return [Taken(x.clock, y[0], y[1], x.peak) for x, y in zip(programs, found, strict=True)]


def table(rounds: Sequence[Sequence[Taken]]) -> str:
    """Medians, in lines."""
    lines = []
    for i, name in enumerate(NAMES):
        clock, processors = (median(x[i].tokens / x[i][j] for x in rounds) for j in (0, 1))
        ratios = (median(x[k][j] / x[i][j] for x in rounds) for k in (0, 1) for j in (0, 1))
        shown = "  ".join(f"{x:.3f}" for x in ratios)
        peak = max(x[i].peak for x in rounds)
        lines.append(f"{name:30} {clock:11,.0f} /s {processors:11,.0f} /processor s  ratios {shown}  {peak:,.0f} MiB")
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    """Measure; the exit code."""
    top = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    top.add_argument("--megabytes", type=int, default=100)
    top.add_argument("--rounds", type=int, default=3)
    top.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    top.add_argument("--tokenizer", type=Path, default=TOKENIZER, metavar="FOLDER", help="with tokenizer.json in it")
    top.add_argument("--memory", action="store_true", help="run the tool alone, once")
    top.add_argument("--one-line", action="store_true", help="as a single document")
    top.add_argument("--alone", type=Path, help=argparse.SUPPRESS)
    args = top.parse_args(argv)
    if args.alone:
        yardstick(args.alone, args.workers)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "corpus.jsonl")
        shutil.copytree(args.tokenizer, path.parent / FOLDER)
        write_corpus(path, args.megabytes * 1_000_000, args.one_line)
        if args.memory:
            program = Program(tool(path, args.workers))
            while program.turn():
                pass
            print(f"peak of the largest process: {program.peak:.0f} MiB")
            return 0
        rounds = []
        for _ in range(args.rounds):
            rounds.append(measure(path, args.workers))
            print(table(rounds[-1:]), flush=True)
    print(f"medians of {args.rounds} rounds; ratios to threads (clock, processors), to processes (likewise)")
    print(table(rounds))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
