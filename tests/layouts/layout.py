"""One row of the matrix: a model, how it is laid out, what else is switched on, and the job of it. Torch-free.

A layout is written as its axes, `fsdp=2 tp=2 cp=2 rotate=alltoall`, and its modifiers, `recompute chunked`.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

AXES = {
    "ddp": "parallelism.data_parallel_replicate_degree",
    "fsdp": "parallelism.data_parallel_shard_degree",
    "tp": "parallelism.tensor_parallel_degree",
    "cp": "parallelism.context_parallel_degree",
    "pp": "parallelism.pipeline_parallel_degree",
}
"""Axes that multiply to the number of ranks, and the keys of their degrees."""

CHOICES = {
    "ep": "parallelism.expert_parallel_degree",
    "etp": "parallelism.expert_tensor_parallel_degree",
    "rotate": "parallelism.context_parallel_rotate_method",
    "balance": "parallelism.context_parallel_load_balancer",
    "schedule": "parallelism.pipeline_parallel_schedule",
    "micro": "parallelism.pipeline_parallel_microbatch_size",
    "layers": "parallelism.pipeline_parallel_layers_per_stage",
    "parts": "parallelism.module_fqns_per_model_part",
    "first_less": "parallelism.pipeline_parallel_first_stage_less_layers",
    "last_less": "parallelism.pipeline_parallel_last_stage_less_layers",
    "csv": "parallelism.pipeline_parallel_schedule_csv",
}
"""What else a layout may say, and the keys of it."""

MODIFIERS = {
    "accumulate": (),  # half as many rows at a time, see `rows`
    "recompute": ("--activation_checkpoint.mode=full",),
    "selective": ("--activation_checkpoint.mode=selective", "--activation_checkpoint.selective_ac_option=2"),
    "by-op": ("--activation_checkpoint.mode=selective", "--activation_checkpoint.selective_ac_option=op"),
    "compile": ("--compile.enable", "--compile.backend=aot_eager"),
    "inductor": ("--compile.enable", "--compile.backend=inductor"),
    "bf16": ("--training.mixed_precision_param=bfloat16",),
    "offload": ("--training.enable_cpu_offload",),
    "chunked": ("--loss.name=chunked_cross_entropy", "--loss.chunk_tokens=7"),
    "gathered-logits": ("--parallelism.disable_loss_parallel",),
    "always": ("--parallelism.fsdp_reshard_after_forward=always",),
    "never": ("--parallelism.fsdp_reshard_after_forward=never",),
    "workers": ("--training.dataloader.num_workers=2",),
    "foreach": ("--optimizer.implementation=foreach",),
    "async": ("--parallelism.enable_async_tensor_parallel",),
    "early": ("--optimizer.early_step_in_backward",),
    "local-tensor": ("--comm.mode=local_tensor",),
    "forced": ("--debug.moe_force_load_balance",),
    "causal": ("--data.document_mask=false",),
}
"""What goes with any layout. Only those of CHANGES change what is computed."""

CHANGES = ("bf16", "causal", "forced")
"""Modifiers that have references of their own."""

COMMON = (
    f"--experimental.custom_import={__package__}.tiny",
    "--training.dataset=uneven",
    "--training.seq_len=48",
    "--training.global_batch_size=8",
    "--training.steps=3",
    "--training.max_norm=0.1",
    "--training.mixed_precision_param=float32",
    "--lr_scheduler.warmup_steps=2",
    "--optimizer.eps=1e-5",
    "--activation_checkpoint.mode=none",
    "--data.document_mask",
    "--validation.enable",
    "--validation.dataset=uneven",
    "--validation.seq_len=48",
    "--validation.local_batch_size=1",
    "--validation.global_batch_size=8",
    "--validation.freq=3",
)
"""Eight rows a step, three steps, then validation. Clipping bites."""

SEEDS = {"qwen/moe": 18, "qwen/deep": 15, "qwen/even": 17, "gpt_oss/small": 60, "llama4/small": 1}
"""`debug.seed` by model, else 7. With experts it is one for which no routing decision is close (see `balance.py`)."""


@dataclass(frozen=True)
class Layout:
    """One row of the matrix."""

    model: str
    """`family/flavor`."""
    axes: str
    """Degrees and choices, as `name=value` with blanks between; degrees of 1 are left out."""
    modifiers: str = ""
    """Names out of MODIFIERS."""
    slow: bool = False
    """Left to the slow set."""
    refused: str = ""
    """Why it cannot be, as a user is told: the row is then a test of that text."""

    @property
    def name(self) -> str:
        """What tests and the page call it."""
        return " ".join(filter(None, (self.model, self.axes or "one rank", self.modifiers and f"+ {self.modifiers}")))

    @property
    def chosen(self) -> dict[str, str]:
        """Its axes and choices."""
        return dict(word.split("=", 1) for word in self.axes.split())

    @property
    def ranks(self) -> int:
        """Number of ranks that it takes."""
        return prod(int(value) for name, value in self.chosen.items() if name in AXES)

    @property
    def processes(self) -> int:
        """Number of processes that its ranks are in."""
        return 1 if "local-tensor" in self.modifiers.split() else self.ranks

    @property
    def rows(self) -> int:
        """Rows at a time: for a pipeline four, so that there are four microbatches; else two; fewer where a rank has no
        more; `accumulate` halves it."""
        data = int(self.chosen.get("ddp", 1)) * int(self.chosen.get("fsdp", 1))
        rows = min(4 if "pp" in self.chosen else 2, 8 // data)
        return rows // 2 if "accumulate" in self.modifiers.split() else rows

    @property
    def low(self) -> bool:
        """Whether it computes in bf16."""
        return "bf16" in self.modifiers.split()

    def reference(self) -> "Layout":
        """The same computation on one rank, without anything that only says how."""
        kept = [word for word in self.modifiers.split() if word in CHANGES]
        return Layout(self.model, "", " ".join(kept))

    def arguments(self) -> list[str]:
        """The command line of the job."""
        family, flavor = self.model.split("/")
        seed = f"--debug.seed={SEEDS.get(self.model, 7)}"
        return [
            *COMMON,
            seed,
            f"--model.name=matrix_{family}",
            f"--model.flavor={flavor}",
            *self._layout(),
            *self._modify(),
        ]

    def _layout(self) -> Iterator[str]:
        yield f"--{AXES['fsdp']}={self.chosen.get('fsdp', 1)}"
        yield f"--training.local_batch_size={self.rows}"
        for name, value in self.chosen.items():
            yield f"--{(AXES | CHOICES)[name]}={value}"

    def _modify(self) -> Iterator[str]:
        for word in self.modifiers.split():
            yield from MODIFIERS[word]
