"""A Llama small enough for tests, brought in as a user would: by `experimental.custom_import`."""

from dataclasses import replace

from models.llama3.args import FLAVORS
from models.llama3.spec import load
from models.train_spec import TrainSpec, families, register_train_spec

UNTIED = replace(FLAVORS["debugmodel"], dim=24, n_layers=2, n_heads=3, n_kv_heads=1, ffn_hidden=40)
SPEC: TrainSpec = replace(load(), model_args={"untied": UNTIED, "tied": replace(UNTIED, tied_embeddings=True)})

if "tiny_llama" not in families:
    register_train_spec("tiny_llama", SPEC)
