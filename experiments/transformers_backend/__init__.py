"""Any causal language model of the package `transformers`, by its config.json: for what has no family of its own yet.

`experimental.custom_import = "experiments.transformers_backend"` registers the family `transformers`, whose flavors are
folders: `model.flavor` names the one with config.json. A key of its own for the folder was rejected: a flavor is what
says a model's shape everywhere, in checkpoints and tools as well. The price of using their modules: their speed, no
context or expert parallelism, and tensor and pipeline parallelism only where a model is built of what we know. What
cannot be is refused with the reason, by the job's problems. Torch-free, as is `args`.
"""

from experiments.transformers_backend.args import Folders
from models.train_spec import register_family

NAME = "transformers"
"""What `model.name` says."""

register_family(NAME, Folders(), "experiments.transformers_backend.spec:load")
