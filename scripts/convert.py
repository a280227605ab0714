"""Convert whole checkpoints, tensor by tensor: a laptop can convert what it could never hold.

    python scripts/convert.py hf-to-dcp HF_FOLDER OUT --model.name llama3 --model.flavor 8B     into OUT/step-0
    python scripts/convert.py dcp-to-hf CHECKPOINT OUT [--dtype bfloat16]                       into OUT/step-N
    python scripts/convert.py titan-to-dcp CHECKPOINT OUT --model.name llama3 --model.flavor 8B into OUT/step-N

titan-to-dcp reads checkpoints of TorchTitan without running anything in them, with Adam's state where they have it.
--verify then loads both sides and compares hidden states after every block and logits of a fixed batch (both models are
held whole, in fp32; transformers must be installed, except for titan-to-dcp). Folders are paths, or URLs that fsspec
knows. Exit codes: 0 done, 1 the two sides differ, 2 your input, or a checkpoint that is broken.
"""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs as a script, from any folder

from components.runtime.errors import CheckpointError
from trainer.command import report_errors

if TYPE_CHECKING:
    from trainer.verify import Trace

DTYPES = ("source", "float32", "bfloat16", "float16")


def hf_to_dcp(args: argparse.Namespace) -> int:
    """Hugging Face's files into a checkpoint to start from; the exit code."""
    from trainer import convert, verify

    target = convert.target_of(args.name, args.flavor, args.custom_import, mtp_layers=args.mtp_layers)
    path = convert.hf_to_dcp(args.source, args.out, target, args.dtype)
    print(job_lines(path))
    if not args.verify:
        return 0
    reference = verify.of_transformers(args.source, target, args.dtype)
    return compare(verify.of_checkpoint(path, target, args.dtype), reference, args.tolerance)


def dcp_to_hf(args: argparse.Namespace) -> int:
    """A checkpoint into Hugging Face's files; the exit code."""
    from trainer import convert, verify
    from trainer.exports import export_checkpoint

    path = export_checkpoint(args.source, args.out, args.dtype, args.assets, args.custom_import)
    print(path)
    if not args.verify:
        return 0
    target = convert.target_of_checkpoint(args.source, args.custom_import)
    dtype, found = convert.export_type(args.source, args.dtype), verify.of_transformers(path, target, "source")
    return compare(found, verify.of_checkpoint(args.source, target, dtype), args.tolerance)


def titan_to_dcp(args: argparse.Namespace) -> int:
    """A checkpoint of TorchTitan into one of ours; the exit code."""
    from trainer import convert, verify

    target = convert.target_of(args.name, args.flavor, args.custom_import)
    path = convert.titan_to_dcp(args.source, args.out, target, args.dtype, args.weights_only)
    whole = convert.is_whole(path)
    print(job_lines(path, with_optimizer=whole))
    if not args.verify:
        return 0
    found = verify.of_checkpoint(path, convert.target_of_checkpoint(path, args.custom_import), args.dtype)
    return compare(found, verify.of_titan(args.source, target, args.dtype), args.tolerance)


def compare(found: "Trace", reference: "Trace", tolerance: float) -> int:
    """Print how far two models are from each other; 1 if that is too far."""
    from trainer import verify

    rows = verify.differences(found, reference)
    print(verify.table(rows, tolerance))
    return int(not all(verify.passes(row, tolerance) for row in rows))


def job_lines(path: str, with_optimizer: bool = False) -> str:
    """The checkpoint's path, and the lines for a TOML."""
    lines = [f"{path}; for your TOML:", "", "[checkpoint]", "enable = true", f'initial_load_path = "{path}"']
    if with_optimizer:
        lines += [
            "initial_load_model_only = false  # Adam's state and the step go on",
            'exclude_from_loading = ["dataloader"]  # data begin anew: where TorchTitan was in them is not known here',
        ]
    return "\n".join(lines)


def count(text: str) -> int:
    """A number that is not negative."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 0 on")
    return int(text)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = top.add_subparsers(required=True, metavar="COMMAND")
    for name, run, default in (
        ("hf-to-dcp", hf_to_dcp, "source"),
        ("dcp-to-hf", dcp_to_hf, "float32"),
        ("titan-to-dcp", titan_to_dcp, "source"),
    ):
        command = commands.add_parser(
            name, aliases=[name.replace("-to-", "2")], help=(run.__doc__ or "").partition(";")[0]
        )
        command.set_defaults(run=run)
        command.add_argument("source", help="what is converted")
        command.add_argument("out", help="folder that will hold step-N")
        command.add_argument("--dtype", choices=DTYPES, default=default, help=f"type of weights (default: {default})")
        command.add_argument("--verify", action="store_true", help="compare both sides' hidden states and logits")
        command.add_argument("--tolerance", type=float, default=1e-4, help="relative difference that passes")
        command.add_argument("--custom-import", default="", help="module that registers the model, if it is your own")
        if run is dcp_to_hf:
            command.add_argument("--assets", help="folder of the tokenizer, whose files are copied too")
        else:
            command.add_argument("--model.name", dest="name", required=True, help="family")
            command.add_argument("--model.flavor", dest="flavor", required=True, help="flavor")
        if run is hf_to_dcp:
            what = "modules of multi-token prediction, where the files have not the flavor's number; 0: none"
            command.add_argument("--model.mtp_layers", dest="mtp_layers", type=count, metavar="N", help=what)
        if run is titan_to_dcp:
            command.add_argument("--weights-only", action="store_true", help="leave the optimizer's state")
    return top


def main(argv: list[str]) -> int:
    """Run a command; its exit code."""
    args = parser().parse_args(argv)

    def run() -> int:
        try:
            return args.run(args)
        except OSError as error:
            raise CheckpointError(f"{error.strerror or error} ('{error.filename}')") from error

    return report_errors(run)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
