"""Look at checkpoints and keep house among them. A folder is a path, or a URL that fsspec knows.

    python scripts/checkpoint.py ls FOLDER [--hashes]          what there is: step, kind, whether whole, size, layout
    python scripts/checkpoint.py verify PATH                   check every byte of a checkpoint, or of all in a folder
    python scripts/checkpoint.py diff A B                      which tensors and values differ, and by how much
    python scripts/checkpoint.py export PATH OUT [--dtype T]   weights as Hugging Face safetensors, into OUT/step-N
    python scripts/checkpoint.py prune FOLDER --keep K         delete the oldest beyond K; --dry-run only says which

Exit codes: 0 done, nothing wrong, no difference; 1 `diff` has found a difference; 2 something is broken or cannot be.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs as a script, from any folder

from components.checkpoint.inspect import Found, describe_layout, prune, size_of, survey
from components.runtime.errors import CheckpointError, EspalierError


def list_all(args: argparse.Namespace) -> int:
    """`ls`."""
    rows = [_row(found, args.hashes) for found in survey(args.folder, args.hashes)]
    columns = range(max(len(row) for row in rows) - 1)
    widths = [max(len(row[column]) for row in rows if column < len(row) - 1) for column in columns]
    for row in rows:
        print("  ".join([*(cell.ljust(width) for cell, width in zip(row[:-1], widths, strict=False)), row[-1]]))
    return 0


def _row(found: Found, hashes: bool) -> tuple[str, ...]:
    if found.manifest is None or found.problem:
        return found.name, found.problem or ""
    manifest = found.manifest
    size, whole = f"{size_of(manifest) / 1e6:.1f} MB", "whole" if hashes else "sizes ok"
    revision = f"revision {manifest.revision[:10]}" if manifest.revision else "revision n/a"
    return found.name, manifest.kind, whole, size, describe_layout(manifest.layout), manifest.created, revision


def verify(args: argparse.Namespace) -> int:
    """`verify`: beside checkpoints nothing is said of other folders."""
    bad, everything = 0, survey(args.path, hashes=True)
    if all(found.other for found in everything):
        there = ", ".join(found.name for found in everything)
        raise CheckpointError(f"'{args.path}': no checkpoint in it; there is {there}")
    for found in everything:
        if not found.other:
            bad += found.problem is not None
            print(f"{found.name}: {found.problem or 'whole'}")
    return 2 if bad else 0


def diff(args: argparse.Namespace) -> int:
    """`diff`."""
    from components.checkpoint.difference import Comparison, open_side
    from components.checkpoint.storage import open_folder

    comparison = Comparison(*(open_side(open_folder(path)) for path in (args.a, args.b)))
    found = False
    for line in comparison.lines():
        found = True
        print(line, flush=True)
    print(comparison.summary())
    return int(found)


def export(args: argparse.Namespace) -> int:
    """`export`."""
    from trainer.exports import export_checkpoint

    print(export_checkpoint(args.path, args.out, args.dtype, args.assets, args.custom_import))
    return 0


def prune_all(args: argparse.Namespace) -> int:
    """`prune`."""
    for fate in prune(args.folder, args.keep, args.dry_run):
        gone = "would be deleted" if args.dry_run else "deleted"
        print(f"{fate.name}: {gone if fate.deleted else 'stays'}{f': {fate.why}' if fate.why else ''}")
    return 0


def positive(text: str) -> int:
    """A number of checkpoints to keep."""
    if not (text.isdecimal() and int(text)):
        raise argparse.ArgumentTypeError(f"{text!r}: must be 1 or more")
    return int(text)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = top.add_subparsers(required=True, metavar="COMMAND")
    ls = commands.add_parser("ls", help="what there is in a folder")
    ls.add_argument("folder")
    ls.add_argument("--hashes", action="store_true", help="check every byte, not only sizes")
    ls.set_defaults(run=list_all)
    check = commands.add_parser("verify", help="check every byte")
    check.add_argument("path")
    check.set_defaults(run=verify)
    compare = commands.add_parser("diff", help="how two checkpoints differ")
    compare.add_argument("a")
    compare.add_argument("b")
    compare.set_defaults(run=diff)
    out = commands.add_parser("export", help="weights as Hugging Face safetensors")
    out.add_argument("path")
    out.add_argument("out", help="folder that will hold step-N")
    out.add_argument("--dtype", choices=("float16", "bfloat16", "float32", "source"), default="float32")
    out.add_argument("--assets", help="folder of the tokenizer, whose files are copied too")
    out.add_argument("--custom-import", default="", help="module that registers the model, if it is your own")
    out.set_defaults(run=export)
    less = commands.add_parser("prune", help="delete the oldest")
    less.add_argument("folder")
    less.add_argument("--keep", type=positive, required=True, help="how many stay, the newest")
    less.add_argument("--dry-run", action="store_true", help="change nothing")
    less.set_defaults(run=prune_all)
    return top


def main(argv: list[str]) -> int:
    """Run a command; its exit code."""
    args = parser().parse_args(argv)
    try:
        return args.run(args)
    except (EspalierError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
