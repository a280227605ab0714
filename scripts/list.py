"""What there is: model families, their flavors with sizes, shipped configs, datasets, optimizers.

    python scripts/list.py models                what `model.name` can say
    python scripts/list.py flavors [FAMILY]      what `model.flavor` can say, with sizes
    python scripts/list.py configs               shipped TOML files: model, flavor, GPUs they are for
    python scripts/list.py datasets              what `training.dataset` can say
    python scripts/list.py optimizers            what `optimizer.name` can say

Families of installed packages are listed too, and with --custom-import MODULE what your own module registers.
--json prints exact numbers for programs. Exit codes: 0 done, 2 your input.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs as a script, from any folder

from models.train_spec import load_entry_points
from trainer import listing
from trainer.command import import_custom, report_errors


def rows_of(args: argparse.Namespace) -> list[listing.Row]:
    """What is asked for."""
    import_custom(args.custom_import)
    if args.what == "flavors":
        list(load_entry_points())
        return listing.list_flavors(args.family)
    if args.what == "models":
        list(load_entry_points())
        return listing.list_models()
    tables = {
        "configs": listing.list_configs,
        "datasets": listing.list_datasets,
        "optimizers": listing.list_optimizers,
    }
    return tables[args.what]()


def show(args: argparse.Namespace) -> int:
    """Print it; the exit code."""
    rows = rows_of(args)
    print(json.dumps(rows, indent=1, ensure_ascii=False) if args.json else listing.table(rows))
    return 0


def parser() -> argparse.ArgumentParser:
    """The command line."""
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--json", action="store_true", help="for programs: exact numbers, null for what is not known")
    common.add_argument("--custom-import", default="", metavar="MODULE", help="module that registers your own")
    top = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = top.add_subparsers(dest="what", required=True, metavar="WHAT")
    for what in ("models", "flavors", "configs", "datasets", "optimizers"):
        command = commands.add_parser(what, parents=[common])
        if what == "flavors":
            command.add_argument("family", nargs="?", help="of this family only")
    return top


def main(argv: list[str]) -> int:
    """Run; the exit code."""
    args = parser().parse_args(argv)
    return report_errors(lambda: show(args))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
