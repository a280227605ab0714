"""Llama 3's TrainSpec; imported by the registry once the model is needed."""

from models.llama3.args import FLAVORS
from models.llama3.hf import ADAPTER
from models.llama3.model import Llama3
from models.llama3.parallelize import parallelize_llama3, pipeline_llama3
from models.train_spec import TrainSpec


def load() -> TrainSpec:
    """The family's TrainSpec: its model, flavors and plan; every builder is the default."""
    return TrainSpec(
        model_cls=Llama3,
        model_args=FLAVORS,
        parallelize_fn=parallelize_llama3,
        pipelining_fn=pipeline_llama3,
        state_dict_adapter=ADAPTER,
    )
