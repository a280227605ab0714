"""A Llama small enough for tests, brought in as a user would: by `experimental.custom_import`."""

from dataclasses import replace

from models.llama3.args import FLAVORS
from models.llama3.spec import load
from models.train_spec import TrainSpec, families, register_train_spec

UNTIED = replace(FLAVORS["debugmodel"], dim=24, n_layers=2, n_heads=3, n_kv_heads=1, ffn_hidden=40)
DEEP = replace(UNTIED, n_layers=5, n_heads=4, n_kv_heads=2)
FLAVOR_ARGS = {
    "untied": UNTIED,
    "tied": replace(UNTIED, tied_embeddings=True),
    "deep": DEEP,
    "deep_tied": replace(DEEP, tied_embeddings=True),
}
SPEC: TrainSpec = replace(load(), model_args=FLAVOR_ARGS)

if "tiny_llama" not in families:
    register_train_spec("tiny_llama", SPEC)
