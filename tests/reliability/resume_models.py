"""The two tiny models of the resume matrix, brought in by `experimental.custom_import`; never by pytest itself, in
whose process names are those that Espalier has."""

from dataclasses import replace

from models.llama3.args import FLAVORS
from models.llama3.spec import load as load_llama
from models.qwen3.spec import load as load_qwen
from models.train_spec import register_train_spec
from tests.layouts import tiny

VOCABULARY = FLAVORS["debugmodel"].vocab_size
DENSE = {"dense": replace(tiny.UNTIED, vocab_size=VOCABULARY, n_layers=4)}
EXPERTS = {"moe": replace(tiny.MOE, vocab_size=VOCABULARY)}

register_train_spec("resume_llama", replace(load_llama(), model_cls=tiny.Loud, model_args=DENSE))
register_train_spec("resume_qwen", replace(load_qwen(), model_cls=tiny.Loud, model_args=EXPERTS))
