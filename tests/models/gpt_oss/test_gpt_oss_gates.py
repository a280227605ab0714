"""GPT-OSS's gates and values where they are clamped, which drawn weights are too small for."""

from pathlib import Path

import torch

from components.layers.shapes import CLAMP
from models.decoder.model import Decoder
from tests.models.families import GPT_OSS
from tests.models.parity import Text, adapter_of, ours, require_close, theirs, twins


def test_clamped_gates_and_values_agree(tmp_path: Path) -> None:
    """With biases from -12 to 12, some of each are beyond either end."""
    model, twin = twins("gpt_oss", GPT_OSS, tmp_path, "eager")
    theirs_of = dict(twin.named_parameters())
    with torch.no_grad():
        for layer in range(GPT_OSS.n_layers):
            biases = torch.linspace(-12.0, 12.0, 3 * 24).view(3, 24)
            theirs_of[f"model.layers.{layer}.mlp.experts.gate_up_proj_bias"].copy_(biases)
            model.get_parameter(f"layers.{layer}.moe.experts.b1").copy_(biases[:, ::2])
            model.get_parameter(f"layers.{layer}.moe.experts.b3").copy_(biases[:, 1::2])
    text = Text.of(GPT_OSS.vocab_size, (40,))
    found, want = ours(model, text), theirs(twin, text, adapter_of("gpt_oss"), GPT_OSS, tmp_path / "gradients")
    require_close("logits", found.logits, want.logits)
    for name, gradient in want.gradients.items():
        require_close(name, found.gradients[name], gradient)
    _require_clamped(model, found.gradients)


def _require_clamped(model: Decoder, gradients: dict[str, torch.Tensor]) -> None:
    """Raise AssertionError unless what is well beyond the ends has no gradient, and some of the rest has."""
    for layer in range(GPT_OSS.n_layers):
        gates, values = (model.get_parameter(f"layers.{layer}.moe.experts.{name}") for name in ("b1", "b3"))
        of_gates, of_values = (gradients[f"layers.{layer}.moe.experts.{name}"] for name in ("b1", "b3"))
        assert of_gates[gates > CLAMP + 2].count_nonzero() == of_values[values.abs() > CLAMP + 2].count_nonzero() == 0
        assert (gates > CLAMP + 2).sum() >= 4 <= (values < -CLAMP - 2).sum()
        assert of_gates.count_nonzero() >= 4 <= of_values.count_nonzero()
