"""Shapes and counts of the Llama 3 flavors."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from components.config.job_config import JobConfig
from components.config.parallelism import Parallelism
from components.config.training import Training, Validation
from models.decoder.model import Decoder
from models.llama3.args import FLAVORS, Llama3Args

PUBLISHED = {
    "1B": 1_235_814_400,
    "3B": 3_212_749_824,
    "8B": 8_030_261_248,
    "70B": 70_553_706_496,
    "405B": 405_853_388_800,
    "3-8B": 8_030_261_248,
    "3-70B": 70_553_706_496,
    "3.3-70B": 70_553_706_496,
}


@pytest.mark.parametrize(("flavor", "count"), PUBLISHED.items())
def test_parameter_counts_are_the_published_ones(flavor: str, count: int) -> None:
    assert FLAVORS[flavor].parameter_count() == count


def test_debugmodel_is_the_yardstick_loop_in_size() -> None:
    assert FLAVORS["debugmodel"].parameter_count() == 6_163_712


def test_flops_count_matrices_and_half_the_attention() -> None:
    args = FLAVORS["debugmodel"]
    matrices = 6 * (4 * 256 * 256 + 3 * 256 * 768) + 2048 * 256
    assert args.flops_per_token(512) == 6 * matrices + 6 * 6 * 256 * 512
    untied = replace(FLAVORS["1B"], tied_embeddings=False)
    assert FLAVORS["1B"].flops_per_token(8192) == untied.flops_per_token(8192)  # a tied head multiplies all the same


def test_flops_match_those_of_the_kernels() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    args = replace(FLAVORS["debugmodel"], n_kv_heads=4)
    with torch.device("meta"):
        model = Decoder(args)
        tokens = torch.zeros(2, 64, dtype=torch.int64)
        with FlopCounterMode(display=False) as counter:
            model.output(model(tokens, tokens)).sum().backward()
    counted = sum(
        n for op, n in counter.get_flop_counts()["Global"].items() if "mm" in str(op) and "bmm" not in str(op)
    )
    assert counted == 2 * 64 * (args.flops_per_token(64) - 6 * 6 * 256 * 64)


def test_problems_name_key_and_number() -> None:
    job = JobConfig(
        parallelism=Parallelism(
            tensor_parallel_degree=64,
            expert_parallel_degree=2,
            expert_tensor_parallel_degree=2,
        ),
        training=Training(seq_len=131073),
        validation=Validation(enable=True, seq_len=200000),
    )
    assert FLAVORS["8B"].problems(job) == [
        "parallelism.expert_parallel_degree = 2: this model has no experts; set it to 1",
        "parallelism.expert_tensor_parallel_degree = 2: this model has no experts; set it to 1",
        "parallelism.tensor_parallel_degree = 64: each rank computes whole heads, but 64 does not divide the 32 heads;"
        " take 1, 2, 4, 8, 16 or 32",
        "training.seq_len = 131073: longer than the 131072 tokens this flavor was made for; shorten it",
        "validation.seq_len = 200000: longer than the 131072 tokens this flavor was made for; shorten it",
    ]
    assert FLAVORS["8B"].problems(JobConfig()) == []


@pytest.mark.parametrize(
    ("heads", "kv_heads", "degree", "end"),
    [
        (12, 4, 2, None),
        (12, 4, 12, None),
        (12, 4, 8, "whole heads, but 8 does not divide the 12 heads; take 1, 2, 4 or 12"),
        (
            12,
            4,
            6,
            "the key-value heads of its heads, but 6 neither divides their number, 4, nor is a multiple of it;"
            " take 1, 2, 4 or 12",
        ),
    ],
)
def test_heads_decide_the_tensor_parallel_degree(heads: int, kv_heads: int, degree: int, end: str | None) -> None:
    job = JobConfig(parallelism=Parallelism(tensor_parallel_degree=degree))
    start = f"parallelism.tensor_parallel_degree = {degree}: each rank computes "
    args = Llama3Args(dim=48, n_layers=1, n_heads=heads, n_kv_heads=kv_heads, ffn_hidden=49, vocab_size=51)
    assert args.problems(job) == ([] if end is None else [start + end])


def test_heads_must_have_pairs_to_turn() -> None:
    assert replace(FLAVORS["debugmodel"], dim=80).problems(JobConfig()) == [
        "model.flavor: heads are 5 wide, but rotary positions turn pairs: the width must be even"
    ]


def test_an_unused_validation_length_is_no_problem() -> None:
    job = JobConfig(validation=Validation(enable=False, seq_len=200000))
    assert FLAVORS["8B"].problems(job) == []


def test_args_need_no_torch() -> None:
    code = "import sys, models.llama3.args; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
