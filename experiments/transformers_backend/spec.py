"""The TrainSpec of models of transformers; imported by the registry once a model is needed."""

from experiments.transformers_backend.args import Folders
from experiments.transformers_backend.hf import ADAPTER
from experiments.transformers_backend.model import HFModel
from experiments.transformers_backend.plan import parallelize_hf, pipeline_hf
from models.train_spec import TrainSpec


def load() -> TrainSpec:
    """The family's TrainSpec."""
    return TrainSpec(
        model_cls=HFModel,
        model_args=Folders(),
        parallelize_fn=parallelize_hf,
        pipelining_fn=pipeline_hf,
        state_dict_adapter=ADAPTER,
    )
