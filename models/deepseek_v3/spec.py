"""DeepSeek's TrainSpec; imported by the registry once the model is needed."""

from models.decoder.spec import decoder_spec
from models.deepseek_v3.args import FLAVORS
from models.deepseek_v3.hf import ADAPTER
from models.train_spec import TrainSpec


def load() -> TrainSpec:
    """The family's TrainSpec."""
    return decoder_spec(FLAVORS, ADAPTER)
