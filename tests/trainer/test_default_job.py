"""The README's first command: the default job learns real text, from start-up to validation."""

import re
import subprocess
from collections import Counter
from itertools import islice
from math import log
from pathlib import Path

import pytest

from components.config.job_config import JobConfig
from components.data.build import build_loader, build_tokenizer
from components.mesh.batch import IGNORE
from tests.trainer.runs import ROOT, records
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


@pytest.mark.slow
def test_the_default_job_learns(tmp_path: Path) -> None:
    done = subprocess.run(
        [ROOT / "run_train.sh", f"--job.dump_folder={tmp_path}", "--metrics.log_freq=1"],
        env=environment(OMP_NUM_THREADS="2"),
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    found = records(tmp_path)
    assert [record["step"] for record in found] == list(range(1, 101))
    last = sum(record["loss"] for record in found[-10:]) / 10
    assert last <= 0.8 * found[0]["loss"]
    assert last < unigram_entropy(load_job([f"--job.config_file={CONFIG}"], {}).job, 100)
    assert found[-1]["validation_loss"] < 0.8 * found[0]["loss"]
    assert len(re.findall(r"^step +\d+  loss", done.stdout, re.MULTILINE)) == 100
    assert not (tmp_path / "checkpoint").exists()
