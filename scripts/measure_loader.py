"""How fast the loader alone is: tokens a second, of each kind of source and packing, with worker processes and without.

    .venv/bin/python scripts/measure_loader.py                                     all, five rounds
    .venv/bin/python scripts/measure_loader.py --rounds 9 --workers 0 --only jsonl
    .venv/bin/python scripts/measure_loader.py --training.seq_len=8192             as another job would read

One rank and one process, but for workers. The text is the standard library of Python, once as JSON lines and once as
indexed token files, in a temporary folder. Each round takes all in turn, a fresh loader each, since a busy machine
drifts; medians over rounds are told, with the slowest and the fastest. Padding is no token. How long training waits for
data is another matter: see measure_overhead.py.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # one process means one
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs as a script, from any folder

from components.config.job_config import JobConfig
from components.data.loader import Loader
from components.data.stdlib import open_stdlib
from components.data.token_index import token_dtype
from components.data.token_writer import IndexedWriter
from components.data.tokenizer import Tokenizer, load_tokenizer
from models.train_spec import families, get_args
from trainer.command import report_errors, validate_job
from trainer.config.load import resolve
from trainer.settle import settle

TOKENIZER = "tests/assets/tokenizer"
CHARACTERS = 12_000_000
WARM_UP = 3
"""Steps before the clock starts: opening files, starting workers, filling queues."""
TEXT, TOKENS = "corpus.jsonl", "corpus"
CASES: Mapping[str, tuple[str, Mapping[str, str]]] = {
    "indexed, native": (TOKENS, {}),
    "indexed, megatron": (TOKENS, {"order": "megatron"}),
    "indexed, best_fit": (TOKENS, {"packing": "best_fit"}),
    "jsonl, concat": (TEXT, {}),
    "jsonl, best_fit": (TEXT, {"packing": "best_fit"}),
    "jsonl, padded": (TEXT, {"packing": "padded"}),
}
"""File, and keys of `[data]`."""


def prepare(folder: Path) -> None:
    """Write the text in both forms."""
    tokenizer, documents, written = load_tokenizer(TOKENIZER), open_stdlib("train"), 0
    end = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    with (
        (folder / TEXT).open("w", encoding="utf-8") as lines,
        IndexedWriter(folder / TOKENS, token_dtype(tokenizer.vocab_size)) as tokens,
    ):
        for number in range(len(documents)):
            text = text_of(documents.document(number))
            lines.write(json.dumps({"text": text}) + "\n")
            tokens.add_document([*tokenizer.encode(text), *end])
            written += len(text)
            if written > CHARACTERS:
                return


def text_of(record: object) -> str:
    """A document's text."""
    return str(record["text"]) if isinstance(record, Mapping) else str(record)


def job_of(folder: Path, file: str, data: Mapping[str, str], workers: int, arguments: Sequence[str]) -> JobConfig:
    """The job of a case."""
    lines = [f'{key} = "{value}"' for key, value in {**data, "cache_folder": str(folder / "cache")}.items()]
    config = folder / "job.toml"
    config.write_text(
        f'[model]\nname = "llama3"\nflavor = "debugmodel"\nhf_assets_path = "{TOKENIZER}"\n'
        "[training]\nseq_len = 2048\nlocal_batch_size = 4\nsteps = 1000000\n"
        f"[training.dataloader]\nnum_workers = {workers}\n"
        "[data]\n" + "\n".join(lines) + f'\n[[data.sources]]\npath = "{folder / file}"\n'
    )
    resolved = resolve([f"--job.config_file={config}", *arguments], os.environ)
    validate_job(resolved, 1)
    return settle(resolved.job, 1, {})[0]


def loader_of(job: JobConfig, tokenizer: Tokenizer) -> Loader:
    """The loader of one rank that has all rows."""
    vocabulary = get_args(job.model.name, job.model.flavor).vocab_size
    build = families[job.model.name].load().build_dataloader_fn
    return build(job, tokenizer=tokenizer, vocab_size=vocabulary, data_rank=0, data_degree=1, validation=False)


def speed(job: JobConfig, tokenizer: Tokenizer, seconds: float) -> float:
    """Tokens a second, for so long."""
    loader = loader_of(job, tokenizer)
    steps = loader.steps()
    for _ in range(WARM_UP):
        next(steps)
    padding, count, begin = loader.report()["padding_tokens"], 0, time.perf_counter()
    while (taken := time.perf_counter() - begin) < seconds:
        next(steps)
        count += 1
    padding = loader.report()["padding_tokens"] - padding
    steps.close()
    return (count * loader.rows * job.training.seq_len - padding) / taken


def measure(args: argparse.Namespace, arguments: Sequence[str]) -> int:
    """Measure and print; the exit code."""
    chosen = [name for name in CASES if any(part in name for part in args.only)]
    tokenizer = load_tokenizer(TOKENIZER)
    found: dict[tuple[str, int], list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder))
        for _ in range(args.rounds):
            for name, workers in product(chosen, args.workers):
                job = job_of(Path(folder), *CASES[name], workers, arguments)
                found.setdefault((name, workers), []).append(speed(job, tokenizer, args.seconds))
    print("| source, packing | workers | tokens/s (median) | slowest | fastest |\n|---|---|---|---|---|")
    for (name, workers), speeds in found.items():
        print(f"| {name} | {workers} | {statistics.median(speeds):,.0f} | {min(speeds):,.0f} | {max(speeds):,.0f} |")
    return 0


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    top.add_argument("--rounds", type=int, default=5, metavar="N", help="default: 5")
    top.add_argument("--seconds", type=float, default=2.0, metavar="S", help="of each measurement (default: 2)")
    top.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2], metavar="N", help="default: 0 1 2")
    top.add_argument("--only", nargs="+", default=[""], metavar="PART", help="cases with one of these in their names")
    return top


def main(argv: Sequence[str]) -> int:
    """What remains of the command line are keys of the job."""
    args, rest = parser().parse_known_args(argv)
    return measure(args, rest)


if __name__ == "__main__":
    sys.exit(report_errors(lambda: main(sys.argv[1:])))
