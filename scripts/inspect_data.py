"""Show a job's rows as its model sees them: tokens, text, which of them a loss is taken at, where documents begin.

    python scripts/inspect_data.py CONFIG.toml [--section.key=value ...]     the first rows, and what 256 rows add up to
    python scripts/inspect_data.py CONFIG.toml --rows 8 --start-step 1000    eight rows from step 1,000 on
    python scripts/inspect_data.py CONFIG.toml --checkpoint FOLDER/step-500  what the job would train on next
    python scripts/inspect_data.py CONFIG.toml --validation [NAME]           a validation set
    python scripts/inspect_data.py CONFIG.toml --html rows.html              as one page, to look at or to send

The rows are those of the job, built by the same code; no model is, and no GPU is used. A batch that follows the number
of ranks is that of NGPU × NNODES ranks, else of one. Streamed rows are found by reading on to the step, which takes the
time that tokenizing takes. Exit codes: 0 done, 1 a checkpoint is broken, 2 your input.
"""

import argparse
import json
import os
import sys
from itertools import islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs as a script, from any folder

from components.runtime.errors import UserError
from trainer.command import report_errors


def inspect(args: argparse.Namespace, job: list[str]) -> int:
    """Show; the exit code."""
    from components.data.inspecting.page import page
    from trainer.inspecting import open_data, survey

    if args.html is not None:
        require_writable(args.html)
    data = open_data(job, os.environ, validation=args.validation, checkpoint=args.checkpoint)
    if args.start_step is not None and data.rows:
        data.rows.go_to(args.start_step)
    shown, sums = survey(data.rows, args.rows, args.stats_rows) if data.rows else ([], None)
    shares = data.rows.shares if data.rows else {}
    pairs = [pair for source in data.pairs for pair in islice(source, args.rows)]
    if args.html is not None:
        write(args.html, page(data.name, shown, sums, shares, data.tokenizer, pairs))
    if args.json:
        plain = {"rows": [view.plain() for view in shown], "survey": sums.plain() if sums else None}
        print(json.dumps(plain | {"pairs": [pair.plain() for pair in pairs]}, ensure_ascii=False))
    elif args.html is None:
        from components.data.inspecting import terminal

        row = terminal.row_table if args.tokens else terminal.row_text
        terminal.show(terminal.everything(data.name, shown, sums, shares, data.tokenizer, row), args.color)
        terminal.show_pairs(pairs, data.tokenizer, args.color)
    return 0


def require_writable(file: Path) -> None:
    """Raises UserError if a page cannot be written there: told before the rows are made, which may take long. What is
    there is kept."""
    write(file, "", "a")
    if file.is_file() and not file.stat().st_size:
        file.unlink()  # nothing is lost, and no empty page is left if the rows cannot be made


def write(file: Path, text: str, mode: str = "w") -> None:
    """Write the page. Raises UserError."""
    try:
        with file.open(mode, encoding="utf-8") as place:
            place.write(text)
    except OSError as error:
        why = f"cannot be written: {error.strerror}; give a file in a folder that is there"
        raise UserError(f"--html {file}: {why}") from error


def number(text: str) -> int:
    """A number that is not negative."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 0 on")
    return int(text)


def step(text: str) -> int:
    """A step, counted from 1."""
    if not (text.isdecimal() and int(text)):
        raise argparse.ArgumentTypeError(f"{text!r} is no step; they count from 1")
    return int(text)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="%(prog)s CONFIG.toml [--section.key=value ...] [options]",
        allow_abbrev=False,
    )
    top.add_argument(
        "--rows", type=number, default=2, metavar="N", help="rows to show, or pairs of each source (default: 2)"
    )
    top.add_argument("--stats-rows", type=number, default=256, metavar="M", help="rows to add up (default: 256)")
    top.add_argument("--start-step", type=step, metavar="T", help="begin with the rows of step T")
    top.add_argument("--checkpoint", metavar="FOLDER", help="begin where this checkpoint of the job stands")
    top.add_argument(
        "--validation", nargs="?", const="", metavar="NAME", help="a validation set; without NAME the first"
    )
    top.add_argument("--tokens", action="store_true", help="a line for each token: place, position, id, label, text")
    top.add_argument("--html", type=Path, metavar="FILE", help="write a page instead")
    top.add_argument("--json", action="store_true", help="for programs")
    top.add_argument("--color", action=argparse.BooleanOptionalAction, default=None, help="default: in a terminal")
    return top


def main(argv: list[str]) -> int:
    """Run; the exit code."""
    args, job = parser().parse_known_args(argv)
    if job and not job[0].startswith("-"):
        job[0] = f"--job.config_file={job[0]}"
    if args.color is None:
        args.color = sys.stdout.isatty() and os.environ.get("TERM") != "dumb" and not os.environ.get("NO_COLOR")
    return report_errors(lambda: inspect(args, job))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
