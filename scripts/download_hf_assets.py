"""Download a model's tokenizer, config and weights from the Hugging Face hub.

    python scripts/download_hf_assets.py Qwen/Qwen3-0.6B                          all that a job needs
    python scripts/download_hf_assets.py Qwen/Qwen3-0.6B --assets tokenizer       its tokenizer alone
    python scripts/download_hf_assets.py Qwen/Qwen3-0.6B --revision COMMIT        exactly that state of it

Files go to LOCAL_DIR/NAME. A download that was interrupted goes on where it stopped when the same command runs again;
each file is compared with the hash that the hub's metadata say, and deleted if it differs. For gated models the token
is read from HF_TOKEN or from the hub's login (`hf auth login`), never from an argument, and never printed. TorchTitan's
flags work too. Exit codes: 0 done, 1 it did not come whole (network, disk), 2 your input (no such model, no access).
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs as a script, from any folder

from components.checkpoint.hub import ASSETS, Fetched, download
from components.runtime.errors import DataError
from trainer.command import report_errors

DEFAULT = ("tokenizer", "config", "safetensors")


def fetch(args: argparse.Namespace) -> int:
    """Download, and say what to write into a job's TOML; the exit code."""
    if args.hf_token is not None:
        raise DataError(
            "--hf_token: everybody on this machine can read a command's arguments: set HF_TOKEN, or log in with"
            " `hf auth login`"
        )
    repo = args.repo_id or args.repo
    if repo is None:
        raise DataError("which model? give its name on the hub, as in Qwen/Qwen3-0.6B")
    patterns = ["*"] if args.all else args.additional_patterns
    assets = args.assets if args.assets or patterns else DEFAULT
    fetched = download(repo, args.revision, args.local_dir, assets, patterns, lambda line: print(line, flush=True))
    print(summary(repo, fetched))
    return 0


def summary(repo: str, fetched: Fetched) -> str:
    """The commit, and the lines for a TOML."""
    folder = fetched.folder.as_posix()
    path = folder if fetched.folder.is_absolute() or folder.startswith(".") else f"./{folder}"
    lines = [f"{repo} at commit {fetched.commit}: {len(fetched.files)} files in '{path}'; for your TOML:"]
    lines += ["", "[model]", f'hf_assets_path = "{path}"']
    if fetched.weights:
        lines += ["", "[checkpoint]", "enable = true", f'initial_load_path = "{path}"', "initial_load_in_hf = true"]
    return "\n".join(lines)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    top.add_argument("repo", nargs="?", help="name of the model on the hub: owner/name")
    top.add_argument("--repo_id", "--repo-id", help="the same")
    top.add_argument("--revision", default="main", help="branch, tag or commit (default: main)")
    top.add_argument("--local_dir", "--local-dir", type=Path, default=Path("assets/hf"), help="default: ./assets/hf")
    kinds = f"of {', '.join(ASSETS)} (default: {' '.join(DEFAULT)})"
    top.add_argument("--assets", nargs="+", default=[], choices=[*ASSETS], metavar="KIND", help=kinds)
    top.add_argument("--additional_patterns", "--additional-patterns", nargs="+", default=[], help="further files")
    top.add_argument("--all", action="store_true", help="all files, but for those in folders")
    top.add_argument("--hf_token", "--hf-token", help=argparse.SUPPRESS)
    return top


def main(argv: list[str]) -> int:
    """Run; the exit code."""
    args = parser().parse_args(argv)
    return report_errors(lambda: fetch(args))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
