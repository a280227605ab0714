"""What the keys of tensor parallelism do."""

from collections import Counter
from typing import Any

import pytest
import torch

from components.config.job_config import JobConfig
from components.config.parallelism import Parallelism
from components.loss.cross_entropy import CrossEntropy
from components.mesh.batch import Batch
from components.mesh.degrees import Degrees
from components.mesh.parallel_dims import ParallelDims
from components.parallel.tensor import tensor
from components.runtime.errors import ConfigError
from models.decoder.model import Decoder
from models.decoder.plan import decoder_plan
from models.llama3.args import Llama3Args
from tests.keys.test_compute_keys import Counting
from tests.ranks import run_ranks
from trainer.config.load import load_job
from trainer.config.names import find_model
from trainer.config.validate import validate

shows = pytest.mark.shows

ARGS = Llama3Args(dim=8, n_layers=1, n_heads=2, n_kv_heads=1, ffn_hidden=9, vocab_size=31)
DEGREES = Degrees(tp=2)


def cut(parallelism: Parallelism) -> Any:
    model = Decoder(ARGS)
    dims = ParallelDims.build(DEGREES, "cpu")
    tensor(model, decoder_plan(ARGS), dims, JobConfig(parallelism=parallelism))
    return model


def elements() -> tuple[int, dict[str, int]]:
    """Elements of the whole model, and of the pieces of some parameters on this rank."""
    model = cut(Parallelism())
    names = ("tok_embeddings.weight", "layers.0.attention.wq.weight", "layers.0.feed_forward.w2.weight", "norm.weight")
    pieces = {name: model.get_parameter(name).to_local().numel() for name in names}
    return sum(p.numel() for p in model.parameters()), pieces


@shows("parallelism.tensor_parallel_degree")
def test_ranks_share_matrices() -> None:
    (all_of_it, first), (same, second) = run_ranks(2, elements)
    assert all_of_it == same == ARGS.parameter_count()
    assert list(first.values()) == [16 * 8, 4 * 8, 8 * 5, 8]
    assert list(second.values()) == [15 * 8, 4 * 8, 8 * 4, 8]


def gathers(disabled: bool) -> Counter[str]:
    """Communication from the hidden states on, forward."""
    model = cut(Parallelism(disable_loss_parallel=disabled))
    ids = torch.zeros(1, 4, dtype=torch.int64)
    hidden = torch.zeros(1, 2, 8)
    with Counting() as count:
        CrossEntropy()(hidden, model.output, Batch(ids, ids, ids, ids))
    return Counter({name: n for name, n in count.operations.items() if "reduce" in name or "gather_into" in name})


@shows("parallelism.disable_loss_parallel")
def test_logits_are_gathered_only_on_demand() -> None:
    all_gather, all_reduce = "_c10d_functional::all_gather_into_tensor", "_c10d_functional::all_reduce"
    assert run_ranks(2, gathers, False) == [{all_gather: 1, all_reduce: 2}] * 2  # of hidden states; peak and sums
    assert run_ranks(2, gathers, True) == [{all_gather: 2}] * 2


def refusal() -> str:
    with pytest.raises(ConfigError) as error:
        cut(Parallelism(enable_async_tensor_parallel=True))
    return str(error.value)


ASYNC = ("--parallelism.tensor_parallel_degree=2", "--parallelism.enable_async_tensor_parallel")


@shows("parallelism.enable_async_tensor_parallel")
def test_asynchronous_tensor_parallelism_is_refused_off_cuda() -> None:
    expected = (
        "parallelism.enable_async_tensor_parallel = true: overlaps through CUDA's symmetric memory, but the device is"
        " cpu; set it to false"
    )
    assert run_ranks(2, refusal) == [expected] * 2


@pytest.mark.parametrize(
    ("arguments", "refused"),
    [
        ((), True),
        (("--compile.enable",), False),
        (("--compile.enable", "--compile.backend=aot_eager"), True),
        (("--compile.enable", "--compile.components=loss"), True),
    ],
)
def test_asynchronous_tensor_parallelism_needs_the_compiler(arguments: tuple[str, ...], refused: bool) -> None:
    job = load_job([*ASYNC, *arguments], {}).job
    line = (
        "parallelism.enable_async_tensor_parallel = true: it is inductor that overlaps, but it does not compile the"
        ' model; set compile.enable to true, with "model" in compile.components and compile.backend = "inductor",'
        " or this to false"
    )
    assert validate(job, 2, find_model(job)[0]) == [line] * refused
