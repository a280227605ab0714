"""Every key of TorchTitan v0.2.2 is here, under its name, with its type and its default; exceptions are listed."""

import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin

import pytest
import tomli_w

from components.config.annotations import is_optional, members, strip
from components.config.job_config import JobConfig
from components.config.schema import get, schema_of
from trainer.config.load import load_job
from trainer.config.titan import DIFFERENT_DEFAULTS, OUR_KEYS, OUR_SECTIONS

SCHEMA = schema_of(JobConfig)

STRICTER = {
    "compile.components": {"list[model | loss]"},
    "parallelism.context_parallel_load_balancer": {"none", "headtail", ""},
}
"""Keys whose type says what v0.2.2 only documents."""

WIDER = {
    "checkpoint.export_dtype": {"source"},
    "parallelism.context_parallel_rotate_method": {"ulysses"},
    "optimizer.implementation": {"auto"},
    "lr_scheduler.decay_type": {"inverse_sqrt"},
    "training.mixed_precision_param": {"auto"},
}
"""Values that v0.2.2 does not have."""


class TitanKey(NamedTuple):
    name: str
    type: Any
    default: object


def titan_keys() -> Iterator[TitanKey]:
    for line in (Path(__file__).parent / "titan_keys.txt").read_text().splitlines():
        if not line.startswith("#"):
            name, _, rest = line.partition(" : ")
            kind, _, default = rest.rpartition(" = ")
            yield TitanKey(name, eval(kind, {"Literal": Literal}), eval(default))


KEYS = list(titan_keys())


def kinds(annotation: Any) -> set[str]:
    """A type as a set of words, without bounds; an int beside a float says nothing, since every int may be one."""
    if get_origin(annotation) in (Union, types.UnionType):
        words = {"none"} if is_optional(annotation) else set()
        words |= {word for member in members(annotation) for word in kinds(strip(member))}
        return words - {"int"} if "float" in words else words
    if get_origin(annotation) is Literal:
        return {v if isinstance(v, str) else type(v).__name__ for v in get_args(annotation)}
    if get_origin(annotation) is list:
        return {f"list[{' | '.join(sorted(kinds(get_args(annotation)[0]), reverse=True))}]"}
    return {strip(annotation).__name__}


def toml_of(values: dict[str, object]) -> str:
    """Dotted keys as a document."""
    tree: dict[str, Any] = {}
    for name, value in values.items():
        *sections, key = name.split(".")
        table = tree
        for section in sections:
            table = table.setdefault(section, {})
        table[key] = value
    return tomli_w.dumps(tree)


def test_the_table_is_whole() -> None:
    assert len(KEYS) == 155  # 149, and 6 of the fault-tolerant variant
    assert len({key.name for key in KEYS}) == 155


@pytest.mark.parametrize("key", KEYS, ids=lambda key: key.name)
def test_type(key: TitanKey) -> None:
    ours = SCHEMA.keys[tuple(key.name.split("."))]
    wanted = kinds(key.type) | WIDER.get(key.name, set())
    assert kinds(ours.type) == STRICTER.get(key.name, wanted)


def test_defaults() -> None:
    ours = {key.name: SCHEMA.keys[tuple(key.name.split("."))].default for key in KEYS}
    different = {key.name: key.default for key in KEYS if ours[key.name] != key.default}
    assert different == DIFFERENT_DEFAULTS
    assert DIFFERENT_DEFAULTS == {
        "checkpoint.last_save_model_only": True,
        "optimizer.implementation": "fused",
        "training.mixed_precision_param": "bfloat16",
    }


def test_our_own_keys_are_listed() -> None:
    theirs = {key.name for key in KEYS}
    added = {key.name for key in SCHEMA.keys.values() if key.path[0] not in OUR_SECTIONS} - theirs
    assert added == set(OUR_KEYS)


def test_every_key_loads_from_toml(tmp_path: Path) -> None:
    values = {key.name: key.default for key in KEYS if key.default is not None}
    (tmp_path / "all.toml").write_text(toml_of(values))
    job = load_job([f"--job.config_file={tmp_path / 'all.toml'}"], {}).job
    assert {name: get(job, tuple(name.split("."))) for name in values} == values


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("job.save_config_file", "resolved.toml"),
        ("model.tokenizer_path", "assets"),
        ("lr_scheduler.total_steps", 5),
        ("lr_scheduler.decay_ratio", 0.5),
        ("training.dataset_path", "here.jsonl"),
        ("training.max_norm", 2),
        ("training.dataloader.prefetch_factor", 2),
        ("parallelism.module_fqns_per_model_part", [["tok_embeddings", "layers.0"], ["norm", "output"]]),
        ("parallelism.pipeline_parallel_layers_per_stage", 4),
        ("checkpoint.initial_load_path", "step-5"),
        ("quantize.linear.float8.recipe_name", "rowwise"),
        ("quantize.grouped_mm.float8.fqns", "experts"),
        ("quantize.grouped_mm.mx.fqns", ["experts"]),
        ("fault_tolerance.semi_sync_method", "diloco"),
        ("validation.dataset_path", "there.jsonl"),
        ("validation.dataloader.prefetch_factor", 2),
        ("debug.seed", 42),
    ],
)
def test_optional_and_mixed_keys_load_from_toml(tmp_path: Path, name: str, value: object) -> None:
    (tmp_path / "one.toml").write_text(toml_of({name: value}))
    job = load_job([f"--job.config_file={tmp_path / 'one.toml'}"], {}).job
    assert get(job, tuple(name.split("."))) == value
