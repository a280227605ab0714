import json
import subprocess
import sys
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from components.checkpoint.fingerprint import compare_fingerprints, fingerprint_of, require_same_job
from components.config.job_config import JobConfig
from components.runtime.errors import CheckpointError

DEFAULT = JobConfig()


def change(section: str, **values: Any) -> JobConfig:
    return replace(DEFAULT, **{section: replace(getattr(DEFAULT, section), **values)})


def differences(job: JobConfig) -> list[str]:
    return compare_fingerprints(fingerprint_of(DEFAULT, {}), fingerprint_of(job, {}))


@pytest.mark.parametrize(
    ("job", "expected"),
    [
        (change("training", seq_len=256), ["training.seq_len: 2048 saved, 256 now"]),
        (change("training", dataset="c4"), ['training.dataset: "c4_test" saved, "c4" now']),
        (change("training", max_norm=float("inf")), ["training.max_norm: 1.0 saved, Infinity now"]),
        (change("model", flavor="8B"), ['model.flavor: "debugmodel" saved, "8B" now']),
        (change("data", document_mask=True), ["data.document_mask: false saved, true now"]),
        (
            change("loss", name="z_loss"),
            ['loss.name: "cross_entropy" saved, "z_loss" now'],
        ),
        (change("optimizer", lr=1e-3), ["optimizer.lr: 0.0008 saved, 0.001 now"]),
        (change("lr_scheduler", total_steps=100), ["lr_scheduler.total_steps: null saved, 100 now"]),
        (change("debug", seed=3), ["debug.seed: null saved, 3 now"]),
    ],
)
def test_what_is_computed_belongs_to_the_job(job: JobConfig, expected: list[str]) -> None:
    assert differences(job) == expected


@pytest.mark.parametrize(
    "job",
    [
        change("training", steps=1),
        change("training", local_batch_size=1),
        change("training", global_batch_size=64),
        change("training", enable_cpu_offload=True),
        change("training", gc_freq=1),
        change("training", on_nonfinite="skip"),
        change("training", dataloader=replace(DEFAULT.training.dataloader, num_workers=4)),
        change("optimizer", implementation="foreach"),
        change("loss", chunk_tokens=7),
        change("loss", name="chunked_cross_entropy"),
        change("parallelism", tensor_parallel_degree=2),
        change("activation_checkpoint", mode="full"),
        change("compile", enable=True),
        change("checkpoint", interval=3),
        change("validation", enable=True),
        change("metrics", log_freq=1),
        change("job", dump_folder="elsewhere"),
        change("profiling", enable_profiling=True),
        change("comm", init_timeout_seconds=1),
        change("debug", deterministic=True),
        change("model", print_after_conversion=True),
    ],
)
def test_how_it_runs_may_change(job: JobConfig) -> None:
    assert differences(job) == []


def test_quantization_counts_once_a_converter_is_listed() -> None:
    assert not any(key.startswith("quantize.") for key in fingerprint_of(DEFAULT, {}))
    keys = fingerprint_of(change("model", converters=["quantize.linear.float8"]), {})
    assert keys["quantize.linear.float8.emulate"] is False


def test_resolved_values_win() -> None:
    keys = fingerprint_of(DEFAULT, {"training.global_batch_size": 32, "data.streams": 32, "data.files": ["a", 1]})
    assert (keys["training.global_batch_size"], keys["data.streams"], keys["data.files"]) == (32, 32, ["a", 1])


@dataclass(frozen=True)
class Idea:
    """A section of a user's own."""

    alpha: float = 0.5
    """A number."""
    inner: dict[str, int] = field(default_factory=dict)
    """A table."""


@dataclass(frozen=True)
class CustomConfig(JobConfig):
    """Sections with one more."""

    idea: Idea = field(default_factory=Idea)
    """It."""


def test_a_section_of_ones_own_belongs_to_the_job() -> None:
    before, after = CustomConfig(), CustomConfig(idea=Idea(0.25, {"a": 1}))
    assert compare_fingerprints(fingerprint_of(before, {}), fingerprint_of(after, {})) == [
        "idea.alpha: 0.5 saved, 0.25 now",
        "idea.inner: {} saved, nothing now",
        "idea.inner.a: nothing saved, 1 now",
    ]


def test_a_fingerprint_is_what_json_gives_back() -> None:
    keys = fingerprint_of(DEFAULT, {"data.shape": (1, 2)})
    assert json.loads(json.dumps(keys)) == keys


def test_the_error_names_all_keys() -> None:
    require_same_job("step-20", {"a": 1}, {"a": 1})
    with pytest.raises(CheckpointError) as caught:
        require_same_job("step-20", {"training.seq_len": 512, "z": 1}, {"training.seq_len": 256, "z": 1.5})
    assert str(caught.value) == (
        "checkpoint step-20 belongs to another job: training.seq_len: 512 saved, 256 now; z: 1 saved, 1.5 now; set "
        "these keys back, start a new job.dump_folder, or start from its weights with checkpoint.initial_load_path in "
        "a new job.dump_folder"
    )


def test_a_key_that_is_newer_than_the_checkpoint_had_its_default() -> None:
    current = fingerprint_of(DEFAULT, {})
    older = {key: value for key, value in current.items() if not key.endswith(("mtp_layers", "mtp_coefficient"))}
    assert len(older) == len(current) - 2
    require_same_job("step-20", older, current)
    with pytest.raises(CheckpointError, match=r"belongs to another job: model\.mtp_layers: nothing saved, 2 now;"):
        require_same_job("step-20", older, fingerprint_of(change("model", mtp_layers=2), {}))


def test_manifests_and_fingerprints_need_no_torch() -> None:
    code = (
        "import sys, components.checkpoint.fingerprint, components.checkpoint.manifest, components.checkpoint.storage\n"
        "print('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
