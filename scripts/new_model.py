"""Begin a new model family: writes models/NAME, its debug config and its tests, and registers it.

    python scripts/new_model.py my_model

It is a plain decoder that trains, exports and passes its tests as it stands; docs/new_model.md says how to go on.
Nothing is written over. Exit codes: 0 done, 2 a name that cannot be or is taken.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs as a script, from any folder

from trainer.command import report_errors
from trainer.scaffold import write_family

ROOT = Path(__file__).resolve().parents[1]


def write(name: str) -> int:
    """Write the family, and say what comes next; the exit code."""
    for path in write_family(name, ROOT):
        print(path.relative_to(ROOT).as_posix())
    config = f"models/{name}/train_configs/debug_model.toml"
    print(f"""
next:
  python -m pytest tests/models/{name}
  CONFIG_FILE={config} ./run_train.sh
  python scripts/generate_docs.py        # the golden files of its config
  python scripts/record_losses.py {name}_debug_model --reason "a new family"
  docs/new_model.md                      # what to change, and what to compare it with""")
    return 0


def main(argv: list[str]) -> int:
    """Run; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="what model.name will say, as in my_model")
    args = parser.parse_args(argv)
    return report_errors(lambda: write(args.name))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
