"""The models and the data of the matrix, brought in as a user would: by `experimental.custom_import`.

Sizes are odd where they may be (vocabulary, feed-forward width), so that shards are uneven. Rows are packed from
documents, and in the first step every second row has no valid label at all: with two or four data-parallel ranks some
rank has none.
"""

from dataclasses import replace
from typing import Any

import numpy as np

from components.config.job_config import JobConfig
from components.data.documents import DatasetRequest
from components.data.indexed import RowIndex
from components.data.registry import datasets
from components.layers.initialize import Init, Normal
from components.layers.shapes import ExpertsShape, Temperature, YarnScaling
from models.decoder.model import Decoder
from models.deepseek_v3.args import DeepseekV3Args
from models.deepseek_v3.spec import load as load_deepseek
from models.gemma3.args import Gemma3Args
from models.gpt_oss.args import GptOssArgs
from models.llama3.args import FLAVORS
from models.llama3.spec import load as load_llama
from models.llama4.args import Llama4Args
from models.mistral.args import MistralArgs
from models.qwen3.args import Qwen3Args
from models.qwen3.spec import load as load_qwen
from models.train_spec import register_train_spec

UNTIED = replace(FLAVORS["debugmodel"], dim=24, n_layers=2, n_heads=4, n_kv_heads=2, ffn_hidden=43, vocab_size=67)
LLAMA = {
    "untied": UNTIED,
    "tied": replace(UNTIED, tied_embeddings=True, n_layers=4),
    "deep": replace(UNTIED, n_layers=8),
    "even": replace(UNTIED, ffn_hidden=44, vocab_size=68),
    "odd": replace(UNTIED, n_heads=3, n_kv_heads=1),
}

EXPERTS = ExpertsShape(count=8, per_token=2, hidden=20, balance_coefficient=0.1, bias_rate=0.02)
MOE = Qwen3Args(dim=24, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=6, vocab_size=67, experts=EXPERTS)
QWEN = {"moe": MOE, "even": replace(MOE, vocab_size=68), "deep": replace(MOE, n_layers=4)}

GROUPED = replace(EXPERTS, score="sigmoid", groups=4, top_groups=2, scale=1.5, selection_bias=True, shared_hidden=10)
LATENT = DeepseekV3Args(
    dim=24,
    n_layers=3,
    n_heads=4,
    ffn_hidden=43,
    vocab_size=67,
    dense_layers=1,
    q_rank=11,
    kv_rank=9,
    nope_dim=5,
    rope_dim=4,
    v_dim=7,
    rope_scaling=YarnScaling(4.0, 16, mscale=1.0, mscale_all_dim=1.0),
    mtp_layers=2,
    experts=GROUPED,
)
DEEPSEEK = {
    "moe": LATENT,
    "dense": replace(LATENT, dense_layers=9),
    "even": replace(LATENT, n_layers=1, mtp_layers=1, ffn_hidden=44, vocab_size=68),
}


SIZES: dict[str, Any] = {"dim": 24, "n_layers": 4, "n_heads": 4, "n_kv_heads": 2, "head_dim": 6, "vocab_size": 67}
ROUTED = ExpertsShape(8, 2, 20, balance_coefficient=0.1, bias_rate=0.02)
MISTRAL = MistralArgs(**SIZES, ffn_hidden=43, sliding_window=9)
GEMMA = Gemma3Args(**SIZES, ffn_hidden=43, sliding_window=9, pattern=2, query_pre_attn_scalar=6, rope_theta=1e3)
GPT_OSS = GptOssArgs(
    **SIZES | {"n_layers": 2},
    window=9,
    experts=replace(ROUTED, router_bias=True, bias=True, activation="clamped_swiglu"),
)
LLAMA4 = Llama4Args(
    **SIZES,
    ffn_hidden=43,
    experts=replace(ROUTED, per_token=1, normalize=False, score="sigmoid", scale_input=True, shared_hidden=20),
    experts_every=2,
    plain_every=4,
    chunk=9,
    temperature=Temperature(6, 0.5),
    max_seq_len=64,
)


class Loud(Decoder):
    """Starts from larger matrices: else attention looks everywhere alike, its gradients are next to nothing beside the
    head's, routers do not tell experts apart, and no bound on them would mean much."""

    def inits(self) -> dict[str, Init]:
        """Matrices that keep a signal's size."""
        loud = Normal(self.args.dim**-0.5)
        return {name: loud if isinstance(init, Normal) else init for name, init in super().inits().items()}


FIRST = ("packed", "barren", "front", "barren", "whole", "barren", "packed", "barren")
LATER = ("packed", "front", "packed", "whole", "barren", "packed", "front", "whole")
VALIDATION_ROWS = 10
"""No multiple of the batch of 8: in the last validation step most rows are padding."""


class UnevenRows:
    """Random tokens in documents. With `data.document_mask` a document of one token has no label: rows then have all
    of their labels, none, or only those of their first third.
    """

    def __init__(self, request: DatasetRequest) -> None:
        self.count = VALIDATION_ROWS if request.validation else None
        self.seq_len, self._vocab = request.seq_len, request.vocab_size
        self.fingerprint = {"uneven": request.validation}

    def row(self, n: int) -> tuple[np.ndarray, np.ndarray]:
        """See RowIndex."""
        length = self.seq_len + 1
        draw = np.random.default_rng([n, int(self.count is None)])
        tokens = (draw.random(length) ** 2 * self._vocab).astype(np.int64)  # some are more frequent than others
        kind = (FIRST if n < len(FIRST) else LATER)[n % len(FIRST)]
        return tokens, np.cumsum(_borders(kind, length, draw))


def _borders(kind: str, length: int, draw: np.random.Generator) -> np.ndarray:
    """1 where a document begins, except the first. # (length,)"""
    borders = np.zeros(length, np.int64)
    if kind == "packed":
        borders[1:] = draw.random(length - 1) < 0.15
    elif kind == "barren":
        borders[1:] = 1
    elif kind == "front":
        borders[length // 3 :] = 1
    return borders


def _open(request: DatasetRequest) -> RowIndex:
    return UnevenRows(request)


def _no_tokenizer(job: JobConfig) -> Any:
    """The rows are tokens already, and reading a tokenizer takes a tenth of a rank's time."""


if "uneven" not in datasets:
    datasets.register("uneven", _open)
    own: dict[str, Any] = {"build_tokenizer_fn": _no_tokenizer}
    own |= {"model_cls": Loud}
    register_train_spec("matrix_llama", replace(load_llama(), model_args=LLAMA, **own))
    register_train_spec("matrix_qwen", replace(load_qwen(), model_args=QWEN, **own))
    register_train_spec("matrix_deepseek", replace(load_deepseek(), model_args=DEEPSEEK, **own))
    others = {"mistral": MISTRAL, "gemma": GEMMA, "gpt_oss": GPT_OSS, "llama4": LLAMA4}
    for family, args in others.items():
        register_train_spec(f"matrix_{family}", replace(load_qwen(), model_args={"small": args}, **own))
