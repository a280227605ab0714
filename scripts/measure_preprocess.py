"""How fast text becomes token files, against what the tokenizer alone reaches on the same cores.

    python scripts/measure_preprocess.py --megabytes 100 --rounds 3

The corpus is the standard library's source as JSON lines, repeated. In each round three take turns: `encode_batch_fast`
alone, in one process with a thread for each core, texts in memory, ids not taken out; the same in a process of one
thread for each core; and `preprocess_data.py run` with a worker for each core, from its start to its end. Prints tokens
per second of the clock and of the processors (medians), and the ratios to the first two (medians of each round's).
"""

import argparse
import json
import multiprocessing
import os
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
BATCH = 4 << 20  # characters; larger ones are not faster, and take a hundred times their size of memory
NAMES = ("encode_batch_fast, threads", "encode_batch_fast, processes", "preprocess_data.py run")


class Taken(NamedTuple):
    """What encoding the corpus took."""

    clock: float
    processors: float
    tokens: int
    peak: float = 0.0
    """MiB of the largest process, where it is asked for."""


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


def alone(path: Path, share: int, of: int) -> tuple[float, float, float, int]:
    """Encode every `of`-th batch: begin and end on the clock, seconds of the processor, tokens."""
    os.environ["TOKENIZERS_PARALLELISM"] = "true" if of == 1 else "false"
    backend = load_tokenizer(str(TOKENIZER))._backend
    batches, held = [[]], 0
    with path.open(encoding="utf-8") as file:
        for line in file:
            batches[-1].append(json.loads(line)["text"])
            held += len(line)
            if held >= BATCH:
                batches.append([])
                held = 0
    began, before, tokens = time.time(), time.process_time(), 0
    for batch in batches[share::of]:
        tokens += sum(map(len, backend.encode_batch_fast(batch, add_special_tokens=False)))
    return began, time.time(), time.process_time() - before, tokens


def encode_alone(path: Path, processes: int) -> Taken:
    """A yardstick; in fresh processes, whose caches are empty."""
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        spans = pool.starmap(alone, [(path, i, processes) for i in range(processes)], chunksize=1)
    clock = max(x[1] for x in spans) - min(x[0] for x in spans)
    return Taken(clock, sum(x[2] for x in spans), sum(x[3] for x in spans))


def whole(path: Path, workers: int) -> Taken:
    """The tool, from start to end; end tokens are not counted."""
    output = path.with_suffix("")
    command = [sys.executable, str(ROOT / "scripts/preprocess_data.py"), "run", "--input", str(path), "--overwrite"]
    command += ["--output", str(output), "--tokenizer", str(TOKENIZER), "--no-append-eod", "--workers", str(workers)]
    began = time.time()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)  # with all of its children
    clock = time.time() - began
    if status:
        raise SystemExit(f"{' '.join(command)}: ended with status {status}")
    tokens = Path(f"{output}_text_document.bin").stat().st_size // 2
    return Taken(clock, used.ru_utime + used.ru_stime, tokens, used.ru_maxrss / 1024)


def table(rounds: Sequence[tuple[Taken, ...]]) -> str:
    """Medians, in lines."""
    lines = []
    for i, name in enumerate(NAMES):
        clock, processors = (median(x[i].tokens / x[i][j] for x in rounds) for j in (0, 1))
        ratios = (median(x[k][j] / x[i][j] for x in rounds) for k in (0, 1) for j in (0, 1))
        shown = "  ".join(f"{x:.3f}" for x in ratios)
        lines.append(f"{name:30} {clock:11,.0f} /s  {processors:11,.0f} /processor s   ratios {shown}")
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    """Measure; the exit code."""
    top = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    top.add_argument("--megabytes", type=int, default=100)
    top.add_argument("--rounds", type=int, default=3)
    top.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    top.add_argument("--memory", action="store_true", help="run the tool alone, once")
    top.add_argument("--one-line", action="store_true", help="as a single document")
    args = top.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "corpus.jsonl")
        write_corpus(path, args.megabytes * 1_000_000, args.one_line)
        rounds = []
        if args.memory:
            taken = whole(path, args.workers)
            print(f"{taken.clock:.0f} s, peak of the largest process: {taken.peak:.0f} MiB")
            return 0
        for _ in range(args.rounds):
            rounds.append((encode_alone(path, 1), encode_alone(path, args.workers), whole(path, args.workers)))
            print(table(rounds[-1:]), flush=True)
    print(f"medians of {args.rounds} rounds; ratios to threads (clock, processors), to processes (likewise)")
    print(table(rounds))
    print(f"peak of the tool's largest process: {max(x[2].peak for x in rounds):.0f} MiB")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
