"""Write what is generated: from the configuration's dataclasses its reference page, its JSON schema and the golden
configs; from the matrix of layouts the page that says which are checked; from the evidence of reliability its table.

    scripts/generate_docs.py            write them
    scripts/generate_docs.py --check    change nothing; exit with 1 and name those that are stale

The golden configs are the shipped TOMLs with every value resolved (`tests/golden/configs`): a change of a default shows
in them as a change of every job that it concerns.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # so that it runs as a script, from any folder

from tests.layouts.page import page as layouts_page  # noqa: E402
from tests.reliability.page import page as reliability_page  # noqa: E402
from trainer.config.docs import config_page, json_schema  # noqa: E402
from trainer.config.load import load_job  # noqa: E402
from trainer.config.output import to_toml  # noqa: E402


def generated() -> Iterator[tuple[Path, str]]:
    """Path and text of every generated file."""
    yield ROOT / "docs/config.md", config_page()
    yield ROOT / "docs/config.schema.json", json_schema()
    yield ROOT / "docs/layouts.md", layouts_page()
    yield ROOT / "docs/reliability.md", reliability_page()
    for source in sorted(ROOT.glob("models/*/train_configs/*.toml")):
        family = source.parent.parent.name
        resolved = load_job([f"--job.config_file={source}"], {})
        yield ROOT / f"tests/golden/configs/{family}_{source.name}", to_toml(resolved.job)


def stale() -> list[Path]:
    """Generated files that are missing or differ, and golden configs whose TOML is gone."""
    files = dict(generated())
    orphans = [path for path in sorted((ROOT / "tests/golden/configs").glob("*.toml")) if path not in files]
    changed = [path for path, text in files.items() if not path.exists() or path.read_text(encoding="utf-8") != text]
    return changed + orphans


def main() -> int:
    """Write or check. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only say which files are stale")
    if parser.parse_args().check:
        found = stale()
        for path in found:
            print(f"{path.relative_to(ROOT)} is stale: run scripts/generate_docs.py", file=sys.stderr)
        return 1 if found else 0
    files = dict(generated())
    for path in stale():
        if path in files:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(files[path], encoding="utf-8")
        else:
            path.unlink()
        print(path.relative_to(ROOT))
    return 0


if __name__ == "__main__":
    sys.exit(main())
