"""The files that a new model family begins with, for `scripts/new_model.py`.

What is written is a plain decoder that trains at once, exports as Llama and agrees with transformers: a family is then
what is changed from there, with its tests passing all the while. Only the standard library is used, so that a broken
tree can still be added to. Templates that ask (names, sizes, options) were rejected: a page of code is edited faster
than a questionnaire is answered.
"""

import keyword
import re
from pathlib import Path
from string import Template

from components.runtime.errors import ConfigError

_NAME = re.compile(r"[a-z][a-z0-9_]*")
_REGISTRY = "models/train_spec.py"
_IMPORT = re.compile(r"    from models\.(\w+)\.args import FLAVORS as \w+\n")
_REGISTER = re.compile(r'    register_family\("(\w+)", \w+, "[\w.:]+"\)\n')

INIT = '"""The $title family: shapes, names in Hugging Face\'s files and training configs."""\n'

ARGS = '''"""The shapes of the $title family. Torch-free, so that `check` and the dry run's arithmetic start at once."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from models.decoder.args import BlockShape, DecoderArgs


@dataclass(frozen=True, kw_only=True)
class ${classname}Args(DecoderArgs):
    """One flavor: a decoder of pre-norm blocks with grouped-query rotary attention and SwiGLU, no biases."""

    norm_eps: float = 1e-5
    max_seq_len: int = 4096

    def block(self, layer: int) -> BlockShape:
        """All alike. `dataclasses.replace` makes other ones of it: see `components/layers/shapes.py`."""
        return super().block(layer)


FLAVORS: Mapping[str, ${classname}Args] = MappingProxyType(
    {
        "debugmodel": ${classname}Args(
            dim=256,
            n_layers=6,
            n_heads=8,
            n_kv_heads=4,
            ffn_hidden=768,
            vocab_size=2048,
        ),
    }
)
'''

HF = '''"""$title as Hugging Face writes it: names of tensors and config.json. Torch-free."""

from typing import Any

from components.checkpoint.hf_config import Adapter
from components.checkpoint.names import Rule, TheirsAlone
from models.$name.args import ${classname}Args
from models.decoder.hf import BLOCK, DEFAULTS, FEED_FORWARD, decoder, decoder_config, tied_head


def rules(args: ${classname}Args) -> tuple[Rule, ...]:
    """The table of names."""
    return decoder({**BLOCK, **FEED_FORWARD}, tied=args.tied_embeddings)


def extras(args: ${classname}Args) -> tuple[TheirsAlone, ...]:
    """What published files hold besides: the head of a tied model."""
    return tied_head(args.tied_embeddings)


def to_config(args: ${classname}Args) -> dict[str, Any]:
    """config.json, without the type of the weights. As it is written, the model is a Llama to transformers."""
    kind = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "mlp_bias": False}
    return {**decoder_config(args), **kind, "intermediate_size": args.ffn_hidden}


def defaults(args: ${classname}Args) -> dict[str, Any]:
    """What transformers takes for a field that a config.json does not say."""
    sizes = {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
    }
    return {**DEFAULTS, **sizes, "mlp_bias": False}


ADAPTER = Adapter(rules, to_config, defaults, extras)
'''

SPEC = '''"""$title's TrainSpec; imported by the registry once the model is needed."""

from models.$name.args import FLAVORS
from models.$name.hf import ADAPTER
from models.decoder.spec import decoder_spec
from models.train_spec import TrainSpec


def load() -> TrainSpec:
    """The family's TrainSpec."""
    return decoder_spec(FLAVORS, ADAPTER)
'''

TOML = """# A small $title learns Python from the source of Python's own standard library. It fits everywhere: under
# 1 GiB of memory, one to two minutes on two CPU cores, no download.
# Layout: none is needed. Set `training.global_batch_size` to keep the batch on any number of ranks.

[job]
description = "$title debug model on the Python standard library"

[model]
name = "$name"
flavor = "debugmodel"
hf_assets_path = "./tests/assets/tokenizer"

[training]
dataset = "pystdlib"
local_batch_size = 4
seq_len = 256
steps = 100

[optimizer]
lr = 4e-3

[lr_scheduler]
warmup_steps = 10

[activation_checkpoint]
mode = "none"

[metrics]
log_freq = 5
"""

TEST = '''"""$title: its counts are its model's, it computes what transformers computes, and it trains."""

from dataclasses import replace
from pathlib import Path

import torch

from models.$name.args import FLAVORS
from models.train_spec import families
from tests.models.parity import Text, require_agreement
from tests.trainer.runs import train

SMALL = replace(FLAVORS["debugmodel"], dim=24, n_layers=2, n_heads=4, n_kv_heads=2, ffn_hidden=40, vocab_size=64)


def test_every_flavor_has_the_parameters_that_it_counts() -> None:
    spec = families["$name"].load()
    for args in FLAVORS.values():
        with torch.device("meta"):
            model = spec.model_cls(args)
        assert sum(parameter.numel() for parameter in model.parameters()) == args.parameter_count()


def test_it_computes_what_transformers_computes(tmp_path: Path) -> None:
    for name, args in (("own head", SMALL), ("tied", replace(SMALL, tied_embeddings=True))):
        texts = (Text.of(args.vocab_size, (33,)), Text.of(args.vocab_size, (19, 1, 8, 12)))
        (folder := tmp_path / name).mkdir()
        require_agreement("$name", args, folder, texts)


def test_it_trains(tmp_path: Path) -> None:
    model = ("--experimental.custom_import=", "--model.name=$name", "--model.flavor=debugmodel")
    losses = [record["loss"] for record in train(1, tmp_path, *model, "--training.steps=4", "--optimizer.lr=3e-3")]
    assert losses[0] > losses[-1] + 0.1
'''

FILES = {
    "models/$name/__init__.py": INIT,
    "models/$name/args.py": ARGS,
    "models/$name/hf.py": HF,
    "models/$name/spec.py": SPEC,
    "models/$name/train_configs/debug_model.toml": TOML,
    "tests/models/$name/test_$name.py": TEST,
}
"""Path below the project → content."""


def write_family(name: str, root: Path) -> list[Path]:
    """Write a new family into a project and register it; the files that were written or changed.

    Nothing is written over. Raises ConfigError for a name that cannot be, or is there.
    """
    _check(name, root)
    words = {"name": name, "title": name.replace("_", " ").title(), "classname": _class_name(name)}
    files = {root / Template(path).substitute(words): Template(text).substitute(words) for path, text in FILES.items()}
    if there := [str(path.relative_to(root)) for path in files if path.exists()]:
        raise ConfigError(f"{', '.join(there)}: there already; nothing is written over")
    registry = root / _REGISTRY
    registered = _registered(registry.read_text("utf-8"), name)
    for path, text in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(_sorted_imports(text, name), "utf-8")
    registry.write_text(registered, "utf-8")
    return [*files, registry]


def _check(name: str, root: Path) -> None:
    if not _NAME.fullmatch(name) or keyword.iskeyword(name) or name.endswith("_"):
        raise ConfigError(
            f"{name!r}: a family's name is a Python module's: small letters, digits and _, no keyword, as in my_model"
        )
    for room in ("models", "tests/models"):
        if (root / room / name).exists() or (root / room / f"{name}.py").exists():
            raise ConfigError(f"{name!r}: there is a {room}/{name} already; choose another name")


def _class_name(name: str) -> str:
    return "".join(part[:1].upper() + part[1:] for part in name.split("_"))


def _registered(text: str, name: str) -> str:
    """The registry's source with two more lines, each where its name belongs. Raises ConfigError if it has none."""
    constant = name.upper()
    lines = {
        _IMPORT: f"    from models.{name}.args import FLAVORS as {constant}\n",
        _REGISTER: f'    register_family("{name}", {constant}, "models.{name}.spec:load")\n',
    }
    for pattern, line in lines.items():
        found = [*pattern.finditer(text)]
        if not found:
            raise ConfigError(
                f"{_REGISTRY}: no line like {line.strip()!r} to put one after: register the family yourself"
            )
        at = next((match.start() for match in found if match[1] > name), found[-1].end())
        text = text[:at] + line + text[at:]
    return text


def _sorted_imports(text: str, name: str) -> str:
    """The imports of the new family's own modules stand behind `models.decoder` or before it, by name."""
    lines = text.splitlines(keepends=True)
    at = [number for number, line in enumerate(lines) if line.startswith("from models.")]
    for number, line in zip(at, sorted(lines[number] for number in at), strict=True):
        lines[number] = line
    return "".join(lines)
