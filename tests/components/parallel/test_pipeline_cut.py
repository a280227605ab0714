"""Where pipelines cut, and what is refused: arithmetic, exact texts."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from components.config.job_config import JobConfig
from components.config.parallelism import Parallelism
from components.mesh.degrees import Degrees
from components.mesh.parallel_dims import ParallelDims
from components.parallel.pipeline import split
from components.parallel.pipeline_cut import Modules, cut_modules, cut_problems
from components.runtime.errors import ConfigError
from models.decoder.args import ORDER
from models.decoder.model import Decoder
from models.decoder.plan import decoder_plan
from models.llama3.args import FLAVORS
from models.qwen3.args import FLAVORS as QWEN3

PP = "parallelism.pipeline_parallel"


def cut(layers: int, costs: dict[str, tuple[float, int]] | None = None, **keys: object) -> list[list[str]]:
    config = Parallelism(**{"pipeline_parallel_degree": 2, **keys})  # type: ignore[arg-type]
    found = cut_modules(config, Modules.expand(ORDER, layers), costs)
    return [[name.removeprefix("layers.") for name in part] for part in found.parts]


def ranks(layers: int, **keys: object) -> tuple[int, ...]:
    config = Parallelism(**keys)  # type: ignore[arg-type]
    return cut_modules(config, Modules.expand(ORDER, layers)).ranks


def refused(layers: int, **keys: object) -> list[str]:
    return cut_problems(Parallelism(**{"pipeline_parallel_degree": 2, **keys}), ORDER, layers)  # type: ignore[arg-type]


def test_modules_are_the_plans_in_order() -> None:
    modules = Modules.expand(ORDER, 3)
    assert modules.names == ("tok_embeddings", "layers.0", "layers.1", "layers.2", "norm", "output")
    assert (modules.before, modules.after) == (("tok_embeddings",), ("norm", "output"))


@pytest.mark.shows("parallelism.pipeline_parallel_first_stage_less_layers")
@pytest.mark.shows("parallelism.pipeline_parallel_last_stage_less_layers")
def test_ends_have_fewer_layers() -> None:
    assert cut(6) == [["tok_embeddings", "0", "1", "2"], ["3", "4", "5", "norm", "output"]]
    assert [len(part) for part in cut(10, pipeline_parallel_degree=4)] == [1 + 2, 3, 3, 2 + 2]
    even: dict[str, Any] = {f"pipeline_parallel_{end}_stage_less_layers": 0 for end in ("first", "last")}
    assert [len(part) for part in cut(8, pipeline_parallel_degree=4, **even)] == [1 + 2, 2, 2, 2 + 2]
    uneven: dict[str, Any] = {
        "pipeline_parallel_first_stage_less_layers": 0,
        "pipeline_parallel_last_stage_less_layers": 2,
    }
    assert [len(part) for part in cut(10, pipeline_parallel_degree=4, **uneven)] == [1 + 3, 3, 3, 1 + 2]


def test_layers_that_do_not_divide_go_where_there_is_least_to_compute() -> None:
    layer, flops = 218e6, {"output": (525e6, 525), "tok_embeddings": (0.0, 525)}
    costs = {f"layers.{i}": (layer, 218) for i in range(32)} | flops
    assert [len(part) for part in cut(32, costs, pipeline_parallel_degree=4)] == [1 + 8, 9, 8, 7 + 2]
    light = {**costs, "output": (1.0, 1)}
    assert [len(part) for part in cut(32, light, pipeline_parallel_degree=4)] == [1 + 8, 8, 8, 8 + 2]
    # Among those that compute as much, the ones that hold less.
    same = {f"layers.{i}": (0.0, 1) for i in range(32)} | {"tok_embeddings": (0.0, 100), "output": (0.0, 3)}
    assert [len(part) for part in cut(32, same, pipeline_parallel_degree=4)] == [1 + 7, 9, 9, 7 + 2]


def test_of_experts_those_count_that_a_token_meets() -> None:
    """With 8 of 128 experts a layer of 30B-A3B costs 57 M multiplications, its head 311 M: 5 layers and more."""
    with torch.device("meta"):
        model = Decoder(QWEN3["30B-A3B"])
    job = JobConfig(parallelism=Parallelism(pipeline_parallel_degree=4))
    stages = split(model, decoder_plan(QWEN3["30B-A3B"]), ParallelDims(Degrees(), 0, {}), job)
    assert [len(stage.module.get_submodule("layers")) for stage in stages] == [12, 13, 12, 11]  # type: ignore[arg-type]


@pytest.mark.shows("parallelism.pipeline_parallel_layers_per_stage")
def test_stages_go_round_or_there_and_back() -> None:
    assert ranks(6, pipeline_parallel_degree=2) == (0, 1)
    assert ranks(6, pipeline_parallel_degree=2, pipeline_parallel_schedule="LoopedBFS") == (0, 1, 0, 1)
    assert ranks(9, pipeline_parallel_degree=3, pipeline_parallel_schedule="zbvzerobubble") == (0, 1, 2, 2, 1, 0)
    per_stage = {"pipeline_parallel_layers_per_stage": 2, "pipeline_parallel_schedule": "Interleaved1F1B"}
    assert ranks(10, pipeline_parallel_degree=2, **per_stage) == (0, 1, 0, 1, 0, 1)


@pytest.mark.parametrize("flavor", [name for name in FLAVORS if name != "debugmodel"])
def test_every_published_shape_can_be_cut(flavor: str) -> None:
    args = FLAVORS[flavor]
    for pp in (2, 4, 8):
        config = Parallelism(pipeline_parallel_degree=pp)
        modules = Modules.expand(ORDER, args.n_layers)
        for name in ("1F1B", "DualPipeV") if args.n_layers >= 2 * pp - 2 else ("1F1B",):
            found = cut_modules(replace(config, pipeline_parallel_schedule=name), modules)
            assert [name for part in found.parts for name in part] == [*modules.names]


@pytest.mark.shows("parallelism.module_fqns_per_model_part")
def test_by_hand() -> None:
    parts = [["tok_embeddings", "layers.0"], ["layers.1", "norm", "output"]]
    assert cut(2, module_fqns_per_model_part=parts) == [["tok_embeddings", "0"], ["1", "norm", "output"]]


KEY = "parallelism.module_fqns_per_model_part"


@pytest.mark.parametrize(
    ("parts", "lines"),
    [
        (
            [["tok_embeddings", "layers.0", "layers.0"], ["layers.2", "norm", "output"]],
            [
                f"{KEY}: layers.2 is no module of this model; did you mean layers.1?",
                f"{KEY}: in no part: layers.1",
                f"{KEY}: in it twice: layers.0",
            ],
        ),
        (
            [["tok_embeddings", "layers.0", "layers.1", "norm", "output"], []],
            [f"{KEY}: part 1 is empty; give it a module"],
        ),
        (
            [["tok_embeddings", "layers.1"], ["layers.0", "norm", "output"]],
            [
                f"{KEY}: layers.1 is out of order; the order is tok_embeddings, layers.0, layers.1, norm, output",
            ],
        ),
        (
            [["tok_embeddings"], ["layers.0", "layers.1"], ["norm", "output"]],
            [f"{KEY} = 3 parts: makes 3 stages, which 2 pipeline ranks cannot share evenly; make a multiple of 2"],
        ),
    ],
)
def test_parts_that_are_not_the_model_are_refused(parts: list[list[str]], lines: list[str]) -> None:
    assert refused(2, module_fqns_per_model_part=parts) == lines


@pytest.mark.parametrize(
    ("keys", "line"),
    [
        (
            {"pipeline_parallel_degree": 8},
            f"{PP}_degree = 8: 4 layers are too few for 8 stages: with {PP}_first_stage_less_layers = 1 and"
            f" {PP}_last_stage_less_layers = 1 a stage has room for (4 + 1 + 1) // 8 = 0, but needs 1; take fewer ranks"
            " or stages, or lower the two",
        ),
        (
            {"pipeline_parallel_layers_per_stage": 2},
            f"{PP}_layers_per_stage = 2: makes 3 stages, which 2 pipeline ranks cannot share evenly; make a multiple of"
            " 2",
        ),
        (
            {"pipeline_parallel_layers_per_stage": 1},
            f"{PP}_layers_per_stage = 1: makes 6 stages on 2 pipeline ranks, 3 stages per rank, but schedule 1F1B takes"
            " 1; change one of the two",
        ),
        (
            {"pipeline_parallel_layers_per_stage": 3, "pipeline_parallel_schedule": "Interleaved1F1B"},
            f"{PP}_layers_per_stage = 3: makes 2 stages on 2 pipeline ranks, 1 stages per rank, but schedule"
            " Interleaved1F1B takes 2 or more; change one of the two",
        ),
    ],
)
def test_what_cannot_be_cut_is_refused(keys: dict[str, object], line: str) -> None:
    assert refused(4, **keys) == [line]


def test_the_first_stage_may_be_the_embedding_alone() -> None:
    assert cut(4, pipeline_parallel_first_stage_less_layers=5)[0] == ["tok_embeddings"]


def test_without_a_pipeline_nothing_is_refused() -> None:
    assert refused(1, pipeline_parallel_degree=1, pipeline_parallel_layers_per_stage=7) == []
    with pytest.raises(ConfigError, match="too few"):
        cut(1, pipeline_parallel_degree=8)
