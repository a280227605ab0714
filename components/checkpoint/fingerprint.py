"""Whose checkpoint it is: the resolved values of all keys that say *what* is computed, compared when a job resumes.

Keys that say *how* (layout, memory, speed), how long, or what is reported are left out, so that they may change from
one run to the next. The sections are named by what is left out: a section that is new, or a user's own, belongs to the
job until somebody says otherwise. A single hash was rejected: it could not say which key differs. Torch-free.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from components.config.job_config import JobConfig
from components.runtime.errors import CheckpointError
from components.runtime.provenance import versions

_HOW_SECTIONS = frozenset(
    {
        "job",
        "parallelism",
        "activation_checkpoint",
        "compile",
        "checkpoint",
        "validation",
        "metrics",
        "profiling",
        "comm",
        "experimental",
        "fault_tolerance",
        "memory_estimation",
    }
)
_HOW_KEYS = (
    "model.print_after_conversion",
    "model.hf_assets_path",  # where data and tokenizer lie; what they are is in the loader's own fingerprint
    "model.tokenizer_path",
    "training.dataset_path",
    "data.sources",  # what they are is in the loader's own fingerprint too
    "data.cache_folder",
    "data.on_bad_record",
    "data.on_end",
    "training.steps",
    "training.dataloader",
    "training.gc_freq",
    "training.gc_debug",
    "training.local_batch_size",
    "training.global_batch_size",  # −1 means nothing by itself: the resolved number is passed in
    "training.enable_cpu_offload",
    "training.on_nonfinite",
    "training.on_spike",
    "training.spike_window",
    "training.spike_loss_factor",
    "training.spike_grad_norm_factor",
    "training.exit_after",
    "loss.chunk_tokens",
    "optimizer.implementation",
    "optimizer.early_step_in_backward",
    "debug.compare_ranks",
    "debug.deterministic",
    "debug.deterministic_warn_only",
)

_SAME = {("loss.name", "chunked_cross_entropy"): "cross_entropy"}
"""Values of keys that compute the same in another way, and what they count as."""


@dataclass(frozen=True)
class JobIdentity:
    """What a manifest says about the job. Equal on all ranks."""

    fingerprint: dict[str, Any]
    """From `fingerprint_of`."""
    layout: dict[str, Any] = field(default_factory=dict)
    """Ranks, degrees of the mesh, batch split: for the reader, not compared."""
    config: str = ""
    """The resolved TOML."""
    revision: str | None = None
    """Git revision of the code, if known."""
    versions: dict[str, str] = field(default_factory=versions)
    """Versions of python, torch and espalier."""


def fingerprint_of(job: JobConfig, resolved: Mapping[str, Any]) -> dict[str, Any]:
    """The job's fingerprint: dotted key → plain value.

    `resolved` holds what the trainer worked out, and wins: numbers for keys that say "derive it"
    (`training.global_batch_size`, `data.streams`, `training.mixed_precision_param`, `debug.seed`), and facts that no
    key holds (a fingerprint of the data).
    """
    keys: dict[str, Any] = {}
    for section in fields(job):
        if section.name not in _HOW_SECTIONS:
            keys |= _flatten(section.name, asdict(getattr(job, section.name)))
    if not job.model.converters:
        keys = {key: value for key, value in keys.items() if not _within(key, "quantize")}
    keys = {key: value for key, value in keys.items() if not any(_within(key, how) for how in _HOW_KEYS)}
    keys = {key: _SAME.get((key, value), value) if isinstance(value, str) else value for key, value in keys.items()}
    return json.loads(json.dumps({**keys, **resolved}))


def _within(key: str, prefix: str) -> bool:
    return key == prefix or key.startswith(prefix + ".")


def _flatten(prefix: str, value: Any) -> dict[str, Any]:
    return dict(_leaves(prefix, value))


def _leaves(prefix: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _leaves(f"{prefix}.{key}", inner)
    else:
        yield prefix, value


def compare_fingerprints(saved: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    """The keys that differ, each as "training.seq_len: 512 saved, 256 now"; empty if it is the same job."""
    return [
        f"{key}: {_show(saved, key)} saved, {_show(current, key)} now"
        for key in sorted({*saved, *current})
        if key not in saved or key not in current or saved[key] != current[key]
    ]


def _show(values: Mapping[str, Any], key: str) -> str:
    return json.dumps(values[key], ensure_ascii=False) if key in values else "nothing"


def require_same_job(name: str, saved: Mapping[str, Any], current: Mapping[str, Any]) -> None:
    """Raise CheckpointError with all keys that differ if checkpoint `name` is of another job.

    A key that the checkpoint does not know, since it is older than the key, had what is the key's default.
    """
    defaults = fingerprint_of(JobConfig(), {})
    newer = {key: value for key, value in current.items() if key in defaults and defaults[key] == value}
    saved = {**newer, **saved}
    if different := compare_fingerprints(saved, current):
        raise CheckpointError(
            f"checkpoint {name} belongs to another job: {'; '.join(different)}; set these keys back, start a new "
            "job.dump_folder, or start from its weights with checkpoint.initial_load_path in a new job.dump_folder"
        )
