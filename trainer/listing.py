"""What there is to train, train with and train on: the tables of `scripts/list.py`.

Families, flavors and configs are read without torch, since who asks for a list wants it at once; the registries of
datasets and optimizers are imported, because only they know what a user's own module adds. Numbers are counted from the
flavors' shapes, and configs are resolved by the very code that a job is: a table kept by hand would soon lie.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from components.config.nearest import did_you_mean
from components.mesh.registry import Registry
from components.runtime.errors import ConfigError
from components.runtime.paths import project_root
from models.decoder.args import DecoderArgs
from models.train_spec import ModelArgs, families
from trainer.config.load import resolve

Row = dict[str, str | int | None]
"""A line of a table: column → value; None: it cannot be known."""

_CONFIGS = ("models/*/train_configs/*.toml", "experiments/**/train_configs/*.toml")
_GPUS = re.compile(r"\b([0-9][0-9,]*) (?:[A-Z0-9]+ )?GPUs?\b")
_UNITS = ((10**12, "T"), (10**9, "B"), (10**6, "M"), (10**3, "k"))


def list_models() -> list[Row]:
    """Every family: how many flavors, and the sizes of its smallest and its largest."""
    rows: list[Row] = []
    for name in sorted(families):
        sizes = sorted(args.parameter_count() for args in families[name].flavors.values())
        smallest, largest = (sizes[0], sizes[-1]) if sizes else (None, None)
        rows.append({"model": name, "flavors": len(sizes), "smallest": smallest, "largest": largest})
    return rows


def list_flavors(family: str | None) -> list[Row]:
    """Every flavor of a family, or of all. Raises ConfigError for a family that there is none of."""
    if family is not None and family not in families:
        known = sorted(families)
        hint = did_you_mean(family, known)
        raise ConfigError(f"{family!r}: no such model family; there are {', '.join(known)}{hint}")
    names = sorted(families) if family is None else [family]
    return [_flavor(name, flavor, args) for name in names for flavor, args in families[name].flavors.items()]


def _flavor(name: str, flavor: str, args: ModelArgs) -> Row:
    decoder = args if isinstance(args, DecoderArgs) else None
    return {
        "model": name,
        "flavor": flavor,
        "parameters": args.parameter_count(),
        "active": active_parameters(decoder) if decoder else None,
        "layers": args.n_layers,
        "longest_row": decoder.max_seq_len if decoder else None,
    }


def active_parameters(args: DecoderArgs) -> int:
    """Parameters that one token meets: all but those of the experts that it does not go to."""
    idle = 0
    for experts in (block.experts for block in (*args.blocks, *args.ahead)):
        if experts is not None:
            idle += experts.matrices(args.dim, experts.count) - experts.matrices(args.dim)
            idle += (experts.count - experts.per_token) * (2 * experts.hidden + args.dim) * experts.bias
    return args.parameter_count() - idle


def list_configs() -> list[Row]:
    """Every TOML that is shipped: what it trains, the GPUs that its comment says it is for, and that comment's first
    sentence. Raises ConfigError for one that cannot be read."""
    root = project_root()
    return [_config(path, root) for pattern in _CONFIGS for path in sorted(root.glob(pattern))]


def _config(path: Path, root: Path) -> Row:
    model, comment = resolve([f"--job.config_file={path}"], {}).job.model, header_comment(path.read_text("utf-8"))
    gpus = _GPUS.search(comment)
    return {
        "file": path.relative_to(root).as_posix(),
        "model": model.name,
        "flavor": model.flavor,
        "gpus": int(gpus[1].replace(",", "")) if gpus else None,
        "about": re.split(r"\.(?:\s|$)", comment, maxsplit=1)[0] or None,
    }


def header_comment(text: str) -> str:
    """The comment that a file begins with, as one line."""
    lines = []
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.lstrip("#").strip())
    return " ".join(lines)


def list_datasets() -> list[Row]:
    """Every dataset that `training.dataset` can name."""
    from components.data.registry import datasets

    return _entries("dataset", datasets)


def list_optimizers() -> list[Row]:
    """Every optimizer that `optimizer.name` can name."""
    from components.optim.optimizers import optimizers

    return _entries("optimizer", optimizers)


def _entries(column: str, registry: Registry) -> list[Row]:
    return [{column: name, "key": registry.key, "module": registry[name].__module__} for name in sorted(registry)]


def table(rows: Sequence[Row], empty: str = "none") -> str:
    """The rows as text: a heading, and columns as wide as they must be."""
    if not rows:
        return empty
    lines = [[key.replace("_", " ") for key in rows[0]], *([_cell(row, key) for key in row] for row in rows)]
    numeric = [all(not isinstance(row[key], str) for row in rows) for key in rows[0]]
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    shown = (
        "  ".join(
            cell.rjust(width) if number else cell.ljust(width)
            for cell, width, number in zip(line, widths, numeric, strict=True)
        )
        for line in lines
    )
    return "\n".join(line.rstrip() for line in shown)


def _cell(row: Mapping[str, str | int | None], key: str) -> str:
    value = row[key]
    if value is None:
        return "n/a"
    if isinstance(value, str):
        return value
    return short_count(value) if key in ("parameters", "active", "smallest", "largest") else f"{value:,}"


def short_count(number: int) -> str:
    """A count with three digits, as in 8.03B."""
    for unit, letter in _UNITS:
        if number >= 0.9995 * unit:
            value = number / unit
            decimals = 2 if value < 9.995 else 1 if value < 99.95 else 0
            return f"{value:.{decimals}f}{letter}"
    return str(number)
