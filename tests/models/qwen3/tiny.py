"""A Qwen3 small enough for tests, dense and with experts, brought in as a user would: by `experimental.custom_import`.

Six experts, of which each token gets three; sizes that divide by no power of two, so that no kernel's own granularity
hides a wrong cut; routers whose scores lie far apart (see `test_qwen3_model`).
"""

from dataclasses import replace

from components.layers.shapes import ExpertsShape
from models.qwen3.args import Qwen3Args
from models.qwen3.spec import load
from models.train_spec import TrainSpec, families, register_train_spec

DENSE = Qwen3Args(dim=24, n_layers=2, n_heads=4, n_kv_heads=2, ffn_hidden=36, head_dim=10, vocab_size=2048)
MOE = replace(
    DENSE, ffn_hidden=0, experts=ExpertsShape(count=6, per_token=3, hidden=14, balance_coefficient=0.05, bias_rate=0.01)
)
SPEC: TrainSpec = replace(load(), model_args={"dense": DENSE, "moe": MOE})

if "tiny_qwen3" not in families:
    register_train_spec("tiny_qwen3", SPEC)
