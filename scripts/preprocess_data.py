"""Make indexed token files (Megatron-LM's .bin/.idx) of text, on all cores; join, divide and look at them.

    python scripts/preprocess_data.py run --input corpus/ --output data/web --tokenizer FOLDER
    python scripts/preprocess_data.py run --input 'a/*.jsonl.zst' b.parquet --output data/b --tokenizer FOLDER --keys a
    python scripts/preprocess_data.py merge data/a_text_document data/b_text_document --output data/both
    python scripts/preprocess_data.py split data/both --output data/both --shares 98,1,1
    python scripts/preprocess_data.py stats data/both --validate --tokenizer FOLDER
    python scripts/preprocess_data.py head data/both --documents 3 --tokenizer FOLDER

`run` reads JSON lines, Parquet and text (one document a file), compressed with gzip or zstandard too, from files,
folders, globs, URLs or standard input (-), and writes OUTPUT_KEY_document.bin and .idx for each key, the same bytes
for any number of workers. Whatever ends it, the same command goes on where it was: docs/preprocess.md. Exit codes:
0 done, 1 failed (the same command goes on), 2 your input, 130 or 143 stopped by SIGINT or SIGTERM (likewise).
"""

import argparse
import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs as a script, from any folder

from trainer.command import report_errors

WORKERS = (
    "threads that encode, two in a process (default: as many as there are cores); 0: everything in this process, one"
    " chunk after the other, as for a debugger; with --ray the number of tasks, at least 1"
)


def run(args: argparse.Namespace) -> int:
    """Encode; the exit code."""
    from components.data.preprocess.job import Options, Stopped, preprocess
    from components.data.preprocess.over_ray import preprocess_over_ray
    from components.data.preprocess.stopping import stoppable
    from components.data.preprocess.telling import bar, summary

    given = {x: getattr(args, x) for x in Options.__dataclass_fields__ if x not in ("inputs", "keys")}
    options = Options(inputs=tuple(args.input), keys=tuple(args.keys.split(",")), **given)
    workers = cores() if args.workers is None else args.workers
    with stoppable() as stop, bar() as shown:
        try:
            if args.ray is None:
                report = preprocess(options, workers, stop, shown.begin)
            else:
                report = preprocess_over_ray(options, args.ray or None, args.workers, stop, shown.begin)
        except Stopped as stopped:
            shown.end()
            print(stopped, file=sys.stderr)
            return 128 + (stop.number or 0)
    print(summary(report))
    return 0


def merge(args: argparse.Namespace) -> int:
    """Join; the exit code."""
    from components.data.preprocess import pieces

    show(pieces.merge(args.prefixes, args.output, args.overwrite))
    return 0


def split(args: argparse.Namespace) -> int:
    """Divide; the exit code."""
    from components.data.preprocess import pieces

    if args.documents is not None:
        made = pieces.split_documents(args.prefix, args.output, args.documents, args.overwrite)
    else:
        made = pieces.split_shares(args.prefix, args.output, args.shares, args.names.split(","), args.overwrite)
    show(*made)
    return 0


def stats(args: argparse.Namespace) -> int:
    """Tell what is in there; the exit code."""
    from components.data.preprocess import looking
    from components.data.preprocess.job import open_tokenizer

    tokenizer = open_tokenizer(args.tokenizer) if args.tokenizer else None
    found = looking.stats(args.prefix, validate=args.validate, tokenizer=tokenizer)
    print(json.dumps(found) if args.json else looking.table(found))
    return 0


def head(args: argparse.Namespace) -> int:
    """Show the first documents; the exit code."""
    from components.data.preprocess import looking
    from components.data.preprocess.job import open_tokenizer

    for line in looking.head(args.prefix, args.documents, open_tokenizer(args.tokenizer) if args.tokenizer else None):
        print(line)
    return 0


def show(*made: tuple[str, int, int]) -> None:
    """Say what was written."""
    for prefix, documents, tokens in made:
        print(f"{prefix}: {documents:,} documents, {tokens:,} tokens")


def cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def number(text: str) -> int:
    """A number that is not negative."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 0 on")
    return int(text)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    raw = argparse.RawDescriptionHelpFormatter
    top = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    commands = top.add_subparsers(required=True, metavar="COMMAND")
    add_run(commands.add_parser("run", help="text to token files"))
    joined = commands.add_parser("merge", help="join token files of one dtype, in the order given")
    joined.add_argument("prefixes", nargs="+", metavar="PREFIX", help="paths without .bin and .idx")
    joined.set_defaults(call=merge)
    divided = commands.add_parser("split", help="divide token files by documents, in file order")
    divided.add_argument("prefix", metavar="PREFIX", help="path without .bin and .idx")
    how = divided.add_mutually_exclusive_group(required=True)
    how.add_argument("--shares", help="up to three shares of the documents, as in 98,1,1")
    how.add_argument("--documents", type=number, metavar="N", help="pieces of N documents: OUTPUT_00000, ...")
    divided.add_argument("--names", default="training,validation,test", help="of the shares: OUTPUT_NAME")
    divided.set_defaults(call=split)
    for command in (joined, divided):
        command.add_argument("--output", required=True, metavar="PREFIX")
        command.add_argument("--overwrite", action="store_true", help="replace what is there")
    told = commands.add_parser("stats", help="documents, tokens, lengths; the index is checked")
    told.add_argument("--validate", action="store_true", help="read all tokens too")
    told.add_argument("--json", action="store_true", help="as one JSON object")
    told.set_defaults(call=stats)
    first = commands.add_parser("head", help="the first documents")
    first.add_argument("--documents", type=number, default=5, metavar="N", help="default: 5")
    first.set_defaults(call=head)
    for command in (told, first):
        command.add_argument("prefix", metavar="PREFIX", help="path without .bin and .idx")
        command.add_argument("--tokenizer", metavar="FOLDER", help="to decode, or to check ids with")
    return top


def add_run(command: argparse.ArgumentParser) -> None:
    """The arguments of `run`; some have Megatron-LM's names too."""
    command.set_defaults(call=run)
    add = command.add_argument
    add("--input", nargs="+", required=True, metavar="PATH", help="files, folders, globs, URLs; - is standard input")
    add("--output", "--output-prefix", required=True, metavar="PREFIX", help="of the files that are written")
    add("--tokenizer", "--tokenizer-model", required=True, metavar="FOLDER", help="with tokenizer.json in it")
    add("--keys", "--json-keys", default="text", help="fields or columns, separated by commas (default: text)")
    yes_or_no = argparse.BooleanOptionalAction
    add("--append-eod", action=yes_or_no, default=True, help="end documents with the end token (default: yes)")
    add("--prepend-bos", action=yes_or_no, default=False, help="begin documents with the begin token (default: no)")
    add("--eod-token", metavar="TOKEN", help="end token, if not the tokenizer's own")
    add("--bos-token", metavar="TOKEN", help="begin token, if not the tokenizer's own")
    add("--dtype", help="of the tokens (default: uint16 for less than 65,500 entries of the vocabulary, else int32)")
    add("--on-bad-record", choices=("error", "skip"), default="error", help="stop, or skip and count (default: error)")
    add("--plain", action="store_true", help="one key: write OUTPUT.bin and .idx")
    add("--overwrite", action="store_true", help="replace finished files, and what was left of another run")
    add("--workers", type=number, metavar="N", help=WORKERS)
    add("--ray", nargs="?", const="", metavar="ADDRESS", help="encode on a Ray cluster; without ADDRESS on a local one")
    add("--save-every", type=float, default=10.0, metavar="SECONDS", help="what a kill may cost (default: 10)")


def main(argv: list[str]) -> int:
    """Run; the exit code."""
    args = parser().parse_args(argv)
    return report_errors(lambda: args.call(args))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
