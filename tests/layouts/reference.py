"""The reference: one process and plain torch. The model's own forward, a cross-entropy, AdamW and clipping written out;
no applier, no FSDP, no Trainer. Only the rows and the initial values come from the code that is tested: both are
functions of the job alone, and have tests of their own.
"""

import functools
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from components.config.job_config import JobConfig
from components.layers.initialize import initialize
from components.mesh.batch import IGNORE, Batch
from components.optim.schedule import lr_factor
from models.train_spec import TrainSpec, families
from tests.layouts.balance import Experts
from tests.layouts.facts import Facts, Step
from tests.layouts.layout import Layout
from tests.ranks import run_ranks
from trainer.build import Model
from trainer.command import import_custom
from trainer.config.load import load_job


@functools.cache
def reference(layout: Layout) -> tuple[Facts, dict[str, str]]:
    """What a layout's reference computes, and the canonical name of every parameter's name; once for all layouts."""
    return run_ranks(1, compute, layout, backend=None)[0]


def compute(layout: Layout) -> tuple[Facts, dict[str, str]]:
    """The same, in this process."""
    job = load_job([*layout.arguments(), "--job.dump_folder=unused"], {}).job
    import_custom(job.experimental.custom_import)
    spec = families[job.model.name].load()
    model = spec.model_cls(spec.args_for_job_fn(spec.model_args[job.model.flavor], job))
    initialize(model, cast(Model, model).inits(), job.debug.seed or 0)
    canonical = {id(p): name for name, p in model.named_parameters()}
    aliases = {name: canonical[id(p)] for name, p in model.named_parameters(remove_duplicate=False)}
    return Run(job, spec, model, low=layout.low).facts(), aliases


class Run:
    """The plain loop."""

    def __init__(self, job: JobConfig, spec: TrainSpec, model: nn.Module, low: bool) -> None:
        self.job, self.spec, self.model, self.low = job, spec, model, low
        self.parameters = dict(model.named_parameters())
        self.experts = Experts(model)

    def facts(self) -> Facts:
        """Train and validate."""
        before = self.state()
        steps, gradients = self.train()
        after = self.state()
        return Facts(steps, self.validate(), gradients, {name: after[name] - before[name] for name in after})

    def state(self) -> dict[str, Tensor]:
        """Copies of all parameters, and of the buffers."""
        values = (*self.parameters.items(), *self.model.named_buffers())
        return {name: value.detach().float().clone() for name, value in values}

    def batches(self, validation: bool) -> Any:
        """The rows of each step, all of them."""
        return self.spec.build_dataloader_fn(
            self.job,
            tokenizer=None,
            vocab_size=self.spec.model_args[self.job.model.flavor].vocab_size,
            data_rank=0,
            data_degree=1,
            validation=validation,
        )

    def train(self) -> tuple[list[Step], dict[str, Tensor]]:
        """The steps, and the gradients of the first."""
        job = self.job
        rate = job.optimizer
        optimizer = torch.optim.AdamW(
            self.model.parameters(), rate.lr, (rate.beta1, rate.beta2), rate.eps, rate.weight_decay
        )
        factor = lr_factor(job.lr_scheduler, job.training.steps)
        steps: list[Step] = []
        first: dict[str, Tensor] = {}
        tokens = 0
        for number, rows in zip(range(1, job.training.steps + 1), self.batches(validation=False), strict=False):
            losses, valid = self.losses(rows.batch)  # (rows, seq) each
            mean = losses.sum() / valid.sum()
            (mean + self.experts.loss(rows.batch.positions, valid)).backward()
            first = first or {name: p.grad.clone() for name, p in self.parameters.items() if p.grad is not None}
            norm = torch.stack([p.grad.norm() for p in self.parameters.values() if p.grad is not None]).norm()
            for parameter in self.parameters.values():
                if parameter.grad is not None:
                    parameter.grad *= min(1.0, job.training.max_norm / (float(norm) + 1e-6))
            for group in optimizer.param_groups:
                group["lr"] = rate.lr * factor(number)
            optimizer.step()
            optimizer.zero_grad()
            self.experts.step()
            tokens += int(valid.sum())
            rows_with = valid.sum(1) > 0
            largest = (losses.sum(1) / valid.sum(1))[rows_with].max()
            steps.append(Step(mean.item(), largest.item(), float(norm), tokens))
        return steps, first

    def validate(self) -> float:
        """The mean loss per valid token of the whole validation set."""
        total, count = 0.0, 0
        with torch.no_grad():
            for rows in self.batches(validation=True):
                losses, valid = self.losses(rows.batch)
                self.experts.loss(rows.batch.positions, valid)  # for its look at the margins
                total, count = total + float(losses.sum()), count + int(valid.sum())
        return total / count

    def losses(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Cross-entropy of each token, 0 where there is no label, and whether there is one. # (rows, seq) each"""
        documents = batch.document_ids if self.job.data.document_mask else None
        logits = self.logits(batch.tokens, batch.positions, documents)
        valid = batch.labels != IGNORE
        losses = F.cross_entropy(logits.float().transpose(1, 2), batch.labels.clamp(min=0), reduction="none")
        return losses * valid, valid

    def logits(self, tokens: Tensor, positions: Tensor, documents: Tensor | None) -> Tensor:
        """The model's answer; in bf16 if asked, parameters being cast and gradients added up in fp32."""

        def run() -> Tensor:
            hidden = self.model(tokens, positions=positions, document_ids=documents)
            return cast(Any, self.model).output(hidden)

        if not self.low:
            return run()
        cast_down = {name: p.to(torch.bfloat16) for name, p in self.parameters.items()}
        return torch.func.functional_call(_Call(self.model, run), {f"model.{n}": p for n, p in cast_down.items()}, ())


class _Call(nn.Module):
    """A function of a model, as a module."""

    def __init__(self, model: nn.Module, run: Any) -> None:
        super().__init__()
        self.model, self.run = model, run

    def forward(self) -> Tensor:
        return self.run()
