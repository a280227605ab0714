"""Shapes, counts and limits of the Qwen3 flavors."""

import subprocess
import sys
from dataclasses import replace

import pytest

from components.config.job import Debug
from components.config.job_config import JobConfig
from components.config.moe import MoE
from components.config.parallelism import Parallelism
from components.config.training import Training
from models.qwen3.args import FLAVORS

PUBLISHED = {
    "0.6B": 596_049_920,
    "1.7B": 1_720_574_976,
    "4B": 4_022_468_096,
    "8B": 8_190_735_360,
    "14B": 14_768_307_200,
    "32B": 32_762_123_264,
    "30B-A3B": 30_532_122_624,
    "235B-A22B": 235_093_634_560,
}


@pytest.mark.parametrize(("flavor", "count"), PUBLISHED.items())
def test_parameter_counts_are_the_published_ones(flavor: str, count: int) -> None:
    assert FLAVORS[flavor].parameter_count() == count


def test_flops_count_what_a_token_meets() -> None:
    dense, experts = FLAVORS["debugmodel"], FLAVORS["debugmodel_moe"]
    attention = 2 * 256 * (8 + 4) * 48
    assert dense.flops_per_token(512) == 6 * (6 * (attention + 3 * 256 * 768) + 2048 * 256) + 6 * 6 * 8 * 48 * 512
    meets = attention + 256 * 16 + 4 * 3 * 256 * 192
    assert experts.flops_per_token(512) == 6 * (6 * meets + 2048 * 256) + 6 * 6 * 8 * 48 * 512
    assert FLAVORS["30B-A3B"].flops_per_token(0) / 6 == pytest.approx(3.0e9, rel=0.05)
    assert FLAVORS["235B-A22B"].flops_per_token(0) / 6 == pytest.approx(22e9, rel=0.05)


def test_problems_name_key_and_number() -> None:
    job = JobConfig(
        parallelism=Parallelism(tensor_parallel_degree=3, expert_parallel_degree=5, expert_tensor_parallel_degree=9),
        training=Training(seq_len=40961),
    )
    heads = (
        "parallelism.tensor_parallel_degree = 3: each rank computes whole heads, but 3 does not divide the 32 heads;"
        " take 1, 2, 4, 8, 16 or 32"
    )
    length = "training.seq_len = 40961: longer than the 40960 tokens this flavor was made for; shorten it"
    assert FLAVORS["30B-A3B"].problems(job) == [
        "parallelism.expert_parallel_degree = 5: 128 experts cannot be dealt evenly to 5 ranks; take a divisor of 128",
        "parallelism.expert_tensor_parallel_degree = 9: 768 columns of each expert cannot be dealt evenly to 9 ranks;"
        " take a divisor of 768",
        heads,
        length,
    ]
    assert FLAVORS["8B"].problems(job) == [
        "parallelism.expert_parallel_degree = 5: this model has no experts; set it to 1",
        "parallelism.expert_tensor_parallel_degree = 9: this model has no experts; set it to 1",
        heads,
        length,
    ]
    assert FLAVORS["235B-A22B"].problems(JobConfig()) == []


def test_keys_override_the_flavor() -> None:
    args = FLAVORS["debugmodel_moe"]
    assert args.experts is not None
    assert args.for_job(JobConfig()) == args
    job = JobConfig(moe=MoE(balance_coefficient=0.0, bias_rate=0.001), debug=Debug(moe_force_load_balance=True))
    expected = replace(args.experts, balance_coefficient=0.0, bias_rate=0.001, force_balance=True)
    assert args.for_job(job).experts == expected
    assert FLAVORS["8B"].for_job(job) == FLAVORS["8B"]


def test_args_need_no_torch() -> None:
    code = "import sys, models.qwen3.args; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
