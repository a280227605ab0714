"""Models of ours beside transformers': saved, exported and imported in one process or on several ranks."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from components.checkpoint.checkpointer import Checkpointer
from components.checkpoint.fingerprint import JobIdentity
from components.checkpoint.hf_config import Adapter
from components.checkpoint.hf_export import SHARD_BYTES, export_hf
from components.checkpoint.hf_import import load_hf
from components.checkpoint.ranks import Ranks
from components.checkpoint.state import model_tensors
from components.checkpoint.storage import Folder, open_storage
from components.layers.initialize import initialize

JOB = JobIdentity({"model.name": "twin"}, config="[training]\n")
ALONE = Ranks(None)


def build(model_cls: Callable[[Any], Any], args: Any, seed: int = 0) -> Any:
    """Our model, initialized, with norms that are not all ones and attention that looks at some tokens more than at
    others."""
    model = model_cls(args)
    initialize(model, model.inits(), seed)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 or "experts.b" in name:
                parameter.uniform_(0.5, 1.5, generator=draw)
            elif ".attention." in name or "router" in name:
                parameter.mul_(12.0)
        for name, buffer in model.named_buffers():
            if name.endswith("expert_bias"):
                buffer.normal_(std=0.1, generator=draw)
    return model


def save(root: Path, model: nn.Module, step: int = 1) -> Checkpointer:
    """A checkpoint of the model's weights alone."""
    store = Checkpointer(root, keep_latest_k=0, group=None)
    store.save_model(step, model_tensors([model]), JOB, torch.float32)
    return store


def export(
    root: Path,
    adapter: Adapter,
    args: Any,
    *,
    ranks: Ranks = ALONE,
    dtype: str = "float32",
    shard_bytes: int = SHARD_BYTES,
    assets: str | None = None,
    to: str = "export",
) -> Folder:
    """Export step 1 of the checkpoints in `root` to `root/export/step-1`."""
    source = open_storage(root).folder("step-1")
    manifest = Checkpointer(root, keep_latest_k=0, group=None)._verifier._read(1)
    target = open_storage(root / to)
    return export_hf(
        source,
        manifest,
        target,
        "step-1",
        adapter,
        args,
        dtype=dtype,
        ranks=ranks,
        assets=assets,
        shard_bytes=shard_bytes,
    )


def load(path: Path | str, model: nn.Module, adapter: Adapter, args: Any, ranks: Ranks = ALONE) -> None:
    """Import into the model."""
    load_hf(str(path), model_tensors([model]), adapter, args, ranks)


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_bytes())


def rewrite_config(folder: Path, **changes: Any) -> None:
    (folder / "config.json").write_text(json.dumps({**config_of(folder), **changes}))


def our_logits(model: Any, tokens: Tensor) -> Tensor:
    positions = torch.arange(tokens.shape[1]).expand(tokens.shape)
    with torch.no_grad():
        return model.output(model(tokens, positions))


def tokens_for(args: Any) -> Tensor:
    return torch.randint(0, args.vocab_size, (2, 40), generator=torch.Generator().manual_seed(5))
