"""A DeepSeek small enough for tests, brought in as a user would: by `experimental.custom_import`.

Odd widths; a dense block, one with experts, and two modules of multi-token prediction, so that they chain. Routers
start with scores that lie far apart, so that rounding does not choose experts.
"""

from dataclasses import replace

from components.layers.initialize import Init, Normal
from components.layers.shapes import ExpertsShape, YarnScaling
from models.decoder.model import Decoder
from models.deepseek_v3.args import DeepseekV3Args
from models.deepseek_v3.spec import load
from models.train_spec import families, register_train_spec

EXPERTS = ExpertsShape(
    count=8,
    per_token=2,
    hidden=14,
    score="sigmoid",
    groups=4,
    top_groups=2,
    scale=1.5,
    selection_bias=True,
    bias_rate=0.01,
    shared_hidden=14,
    balance_coefficient=0.05,
)
TINY = DeepseekV3Args(
    dim=24,
    n_layers=2,
    n_heads=4,
    ffn_hidden=36,
    vocab_size=2048,
    dense_layers=1,
    q_rank=18,
    kv_rank=14,
    nope_dim=6,
    rope_dim=4,
    v_dim=7,
    rope_scaling=YarnScaling(4.0, 16, mscale=1.0, mscale_all_dim=1.0),
    mtp_layers=2,
    experts=EXPERTS,
)
DENSE = replace(TINY, dense_layers=99)


class Loud(Decoder):
    """Starts from larger matrices, so that attention and routers tell tokens apart."""

    def inits(self) -> dict[str, Init]:
        """Matrices that keep a signal's size."""
        loud = Normal(self.args.dim**-0.5)
        return {name: loud if isinstance(init, Normal) else init for name, init in super().inits().items()}


if "tiny_deepseek" not in families:
    register_train_spec("tiny_deepseek", replace(load(), model_cls=Loud, model_args={"moe": TINY, "dense": DENSE}))
