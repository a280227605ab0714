"""The README's first command: the default job learns real text, from start-up to validation."""

import re
import subprocess
from collections import Counter
from itertools import islice
from math import log
from pathlib import Path
from typing import Any

import pytest

from components.config.job_config import JobConfig
from components.data.build import build_loader, build_tokenizer
from components.mesh.batch import IGNORE
from tests.trainer.runs import ROOT, facts, records
from tests.trainer.test_launch import environment
from trainer.config.load import load_job

CONFIG = ROOT / "models/llama3/train_configs/debug_model.toml"


def unigram_entropy(job: JobConfig, steps: int) -> float:
    """Entropy in nats of the labels of the first steps: the loss of a model that knows only how frequent they are."""
    loader = build_loader(job, tokenizer=build_tokenizer(job), data_rank=0, data_degree=1, vocab_size=2048)
    counts: Counter[int] = Counter()
    for rows in islice(loader, steps):
        counts.update(rows.batch.labels[rows.batch.labels != IGNORE].tolist())
    total = sum(counts.values())
    return -sum(count / total * log(count / total) for count in counts.values())


def run(folder: Path, *arguments: str, **variables: str) -> list[dict[str, Any]]:
    done = subprocess.run(
        [ROOT / "run_train.sh", f"--job.dump_folder={folder}", "--metrics.log_freq=1", *arguments],
        env=environment(**variables),
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    lines = re.findall(r"^step +\d+  loss", done.stdout, re.MULTILINE)
    found = records(folder)
    assert len(lines) == len(found)
    return found


@pytest.mark.slow
def test_its_numbers_do_not_depend_on_the_number_of_ranks(tmp_path: Path) -> None:
    """At full size, where sums over millions of elements show what tiny models hide."""
    common = ("--training.global_batch_size=4", "--training.steps=10", "--validation.enable=false")
    one, two, four = (
        run(tmp_path / str(ranks), *common, f"--training.local_batch_size={4 // ranks}", NGPU=str(ranks))
        for ranks in (1, 2, 4)
    )
    for reference, second, fourth in zip(one, two, four, strict=True):
        for other in (second, fourth):
            assert facts(other) == pytest.approx(facts(reference), rel=1e-5)
            assert other["tokens"] == reference["tokens"]
    missing = [1024 * record["step"] - record["tokens"] for record in one]
    assert missing == [0, 1, 1, 1, 2, 2, 2, 2, 3, 3]  # nothing predicts the first token of a document


@pytest.mark.slow
def test_the_default_job_learns(tmp_path: Path) -> None:
    found = run(tmp_path, OMP_NUM_THREADS="2")
    assert [record["step"] for record in found] == list(range(1, 101))
    last = sum(record["loss"] for record in found[-10:]) / 10
    assert last <= 0.8 * found[0]["loss"]
    assert last < unigram_entropy(load_job([f"--job.config_file={CONFIG}"], {}).job, 100)
    assert found[-1]["validation_loss"] < 0.8 * found[0]["loss"]
    assert not (tmp_path / "checkpoint").exists()
