"""TrainSpec: the one thing a model family hands to the Trainer, and the registry it is looked up in.

Two steps, so that `check` and `--help` need no torch. A registry entry is a Family: name, flavors, `load`, all torch-
free. `load()` imports the model and returns its TrainSpec. The default builders import what they need when they are
called; a minimal spec names a model, its flavors and its plan, and replaces a builder only where its idea is."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any, Protocol

from components.config.job_config import JobConfig
from components.mesh.registry import Registry
from components.runtime.errors import ConfigError

if TYPE_CHECKING:
    import torch
    from torch import nn

    from components.checkpoint.hf_config import Adapter
    from components.data.loader import Loader
    from components.data.tokenizer import Tokenizer
    from components.loss.cross_entropy import LossFn
    from components.mesh.parallel_dims import ParallelDims
    from components.metrics.sinks import Sinks
    from components.metrics.step import Validated
    from components.optim.optimizers import Optimizers
    from components.optim.schedule import LRSchedule
    from components.parallel.pipeline import Stage
    from components.runtime.world import World

ENTRY_POINT_GROUP = "espalier.train_specs"


class ModelArgs(Protocol):
    """A flavor's shape: torch-free, frozen, comparable. Every family's arguments have at least these."""

    @property
    def vocab_size(self) -> int:
        """Entries of the embedding."""
        ...

    @property
    def n_layers(self) -> int:
        """Number of blocks."""
        ...

    def parameter_count(self) -> int:
        """Exact number of parameters; a tied matrix counts once."""
        ...

    def flops_per_token(self, seq_len: int) -> float:
        """FLOPs of forward and backward for one token of a row of `seq_len`, causal attention counted half."""
        ...

    def problems(self, job: JobConfig) -> list[str]:
        """Why this shape cannot run that job; empty if it can. Each line begins with a dotted key."""
        ...


class Validates(Protocol):
    """What the Trainer asks of a validator."""

    def validate(self, step: int) -> float | Validated:
        """The mean loss per valid token over the validation set, or over each of several; equal on all ranks."""
        ...

    def close(self) -> None:
        """Stop worker processes."""
        ...


def build_default_optimizers(parts: Sequence[nn.Module], job: JobConfig, device: torch.device) -> Optimizers:
    """The optimizer of `[optimizer]` over all parameters of `parts`."""
    from components.optim.optimizers import build_optimizers

    return build_optimizers(list(parts), job.optimizer, device)


def build_default_lr_schedulers(optimizers: Optimizers, job: JobConfig) -> LRSchedule:
    """The schedule of `[lr_scheduler]`, a pure function of the step."""
    from components.optim.schedule import LRSchedule, lr_factor, schedule_notes
    from components.runtime.logging import logger

    for note in schedule_notes(job.lr_scheduler, job.training.steps):
        logger.info("note: %s", note)
    return LRSchedule(optimizers, lr_factor(job.lr_scheduler, job.training.steps))


def build_default_tokenizer(job: JobConfig) -> Tokenizer:
    """The `tokenizer.json` in `model.tokenizer_path`, else in `model.hf_assets_path`."""
    from components.data.build import build_tokenizer

    return build_tokenizer(job)


def build_default_dataloader(
    job: JobConfig,
    *,
    tokenizer: Tokenizer,
    vocab_size: int,
    data_rank: int,
    data_degree: int,
    validation: bool = False,
) -> Loader:
    """Rows of `training.dataset`, or of `validation.dataset`, in the job's order."""
    from components.data.build import build_loader

    return build_loader(
        job,
        tokenizer=tokenizer,
        vocab_size=vocab_size,
        data_rank=data_rank,
        data_degree=data_degree,
        validation=validation,
    )


def build_default_loss(job: JobConfig) -> LossFn:
    """The loss of `[loss]`; what it takes of each token's logits is compiled where `[compile]` says so."""
    from components.loss.cross_entropy import ChunkedCrossEntropy, CrossEntropy, Judge, build_loss
    from components.parallel.compile import compile_loss

    loss = build_loss(job.loss)
    if isinstance(loss, CrossEntropy | ChunkedCrossEntropy):
        judge = loss.judge
        of_shards = judge.shard_losses and compile_loss(judge.shard_losses, job.compile)
        return replace(loss, judge=Judge(compile_loss(judge.token_losses, job.compile), of_shards))
    return compile_loss(loss, job.compile)


def build_default_metrics_processor(job: JobConfig, world: World, resume_step: int | None) -> Sinks:
    """Console, `metrics.jsonl`, and the sinks of `[metrics]`."""
    from pathlib import Path

    from components.metrics.sinks import build_sinks

    return build_sinks(job, world, Path(job.job.dump_folder), resume_step)


@dataclass(frozen=True)
class TrainSpec:
    """How one model family is built and trained."""

    model_cls: Callable[[Any], nn.Module]
    """Builds the model from its arguments; called on the meta device."""
    model_args: Mapping[str, ModelArgs]
    """Flavor → arguments."""
    parallelize_fn: Callable[[nn.Module, ParallelDims, JobConfig, torch.dtype], nn.Module]
    """(model, dims, job, compute dtype) → the model laid out over the mesh; usually the family's plan and one call."""
    pipelining_fn: Callable[[nn.Module, ParallelDims, JobConfig], list[Stage]] | None = None
    """(whole model on the meta device, dims, job) → this rank's pipeline stages, in order; None: the family has no plan
    for pipeline parallelism."""
    args_for_job_fn: Callable[[Any, JobConfig], Any] = lambda args, job: args
    """(arguments, job) → arguments with what the job's keys change of them; what `model_cls` is then called with."""
    inputs: tuple[str, ...] = ("positions", "document_ids")
    """What the model reads of each token besides its id, as keyword arguments (rows, seq): `positions`, `document_ids`
    (only with `data.document_mask`), `shares` (each token's share of the step's loss: 1 / valid tokens of the global
    batch, 0 without a valid label; only in training), `ahead` and `ahead_shares` (rows, seq, depth) (for multi-token
    prediction, see `Decoder.forward`; only in training, and only where the arguments have `mtp_layers`)."""
    build_optimizers_fn: Callable[[Sequence[nn.Module], JobConfig, torch.device], Optimizers] = build_default_optimizers
    """(model parts, job, device) → optimizers."""
    build_lr_schedulers_fn: Callable[[Optimizers, JobConfig], LRSchedule] = build_default_lr_schedulers
    """(optimizers, job) → schedule."""
    build_dataloader_fn: Callable[..., Loader] = build_default_dataloader
    """See `build_default_dataloader` for its arguments."""
    build_tokenizer_fn: Callable[[JobConfig], Tokenizer] = build_default_tokenizer
    """job → tokenizer."""
    build_loss_fn: Callable[[JobConfig], LossFn] = build_default_loss
    """job → loss."""
    build_validator_fn: Callable[[Any], Validates] | None = None
    """trainer → validator; None: the Trainer's own, which validates through its forward path."""
    build_metrics_processor_fn: Callable[[JobConfig, World, int | None], Sinks] = build_default_metrics_processor
    """(job, world, step resumed from) → sinks."""
    state_dict_adapter: Adapter | None = None
    """How Hugging Face writes this family: names of tensors and config.json; None: neither import nor export."""


@dataclass(frozen=True)
class Family:
    """A registry entry: what can be said about a model family without torch."""

    name: str
    """What `model.name` says."""
    flavors: Mapping[str, ModelArgs]
    """Flavor → arguments."""
    load: Callable[[], TrainSpec] = field(repr=False)
    """Imports the model; the only part that needs torch."""


families: Registry[Family] = Registry("model family", "model.name")


def register_train_spec(name: str, spec: TrainSpec) -> TrainSpec:
    """Register a family whose TrainSpec is at hand, from a module named in `experimental.custom_import`."""
    families.register(name, Family(name, spec.model_args, lambda: spec))
    return spec


def register_family(name: str, flavors: Mapping[str, ModelArgs], spec: str) -> None:
    """Register a family without importing its model. `spec` is "module:function"; the function returns a TrainSpec."""
    module, _, function = spec.partition(":")
    families.register(name, Family(name, flavors, lambda: getattr(importlib.import_module(module), function)()))


def _register_built_in() -> None:
    from models.deepseek_v3.args import FLAVORS as DEEPSEEK_V3
    from models.gemma3.args import FLAVORS as GEMMA3
    from models.gpt_oss.args import FLAVORS as GPT_OSS
    from models.llama3.args import FLAVORS as LLAMA3
    from models.llama4.args import FLAVORS as LLAMA4
    from models.mistral.args import FLAVORS as MISTRAL
    from models.qwen3.args import FLAVORS as QWEN3

    register_family("deepseek_v3", DEEPSEEK_V3, "models.deepseek_v3.spec:load")
    register_family("gemma3", GEMMA3, "models.gemma3.spec:load")
    register_family("gpt_oss", GPT_OSS, "models.gpt_oss.spec:load")
    register_family("llama3", LLAMA3, "models.llama3.spec:load")
    register_family("llama4", LLAMA4, "models.llama4.spec:load")
    register_family("mistral", MISTRAL, "models.mistral.spec:load")
    register_family("qwen3", QWEN3, "models.qwen3.spec:load")


def load_entry_points() -> Iterator[str]:
    """Let installed packages register: each entry point of the group is a function without arguments. Yields names.

    Raises ConfigError that names the package when one cannot be loaded.
    """
    for point in entry_points(group=ENTRY_POINT_GROUP):
        try:
            point.load()()
        except Exception as error:  # somebody else's code may raise anything
            package = point.dist.name if point.dist else point.value
            raise ConfigError(
                f"entry point {point.name!r} of package {package!r} ({point.value}) cannot be loaded:"
                f" {type(error).__name__}: {error}; mend or uninstall the package"
            ) from error
        yield point.name


def get_args(name: str, flavor: str) -> ModelArgs:
    """A flavor's arguments. Raises ConfigError that lists what there is."""
    family = families.lookup(name)
    if flavor in family.flavors:
        return family.flavors[flavor]
    flavors: Registry[ModelArgs] = Registry(f"flavor of {name}", "model.flavor")
    for known, args in family.flavors.items():
        flavors.register(known, args)
    return flavors.lookup(flavor)


_register_built_in()
