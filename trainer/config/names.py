"""Are the names that a job uses registered? By torch-free tables of the built-in names.

A module named in `experimental.custom_import` may register further names, and only importing it would tell: then an
unknown name is not judged here but by its registry, when it is used.
"""

from collections.abc import Iterator, Sequence
from importlib.metadata import entry_points

from components.config.annotations import toml_literal
from components.config.job_config import JobConfig
from components.config.nearest import did_you_mean
from components.data.names import DATASETS
from components.loss.names import LOSSES
from components.optim.names import OPTIMIZERS
from components.runtime.errors import ConfigError
from models.decoder.args import DecoderArgs
from models.train_spec import ENTRY_POINT_GROUP, ModelArgs, families, get_args
from trainer.config.support import CONVERTERS


def check_names(job: JobConfig) -> Iterator[str]:
    """A line for each name that is neither built in nor possibly registered by `experimental.custom_import`."""
    if job.experimental.custom_import:
        return
    uses: list[tuple[str, str, Sequence[str]]] = [
        ("optimizer.name", job.optimizer.name, OPTIMIZERS),
        ("loss.name", job.loss.name, LOSSES),
    ]
    uses += [("model.converters", name, CONVERTERS) for name in job.model.converters]
    if job.training.dataset_path is None and not job.data.sources:
        uses.append(("training.dataset", job.training.dataset, DATASETS))
    if job.validation.enable and job.validation.dataset_path is None and not job.validation.sources:
        uses.append(("validation.dataset", job.validation.dataset, DATASETS))
    for key, name, known in uses:
        if name not in known:
            hint = f" (or give {key}_path)" if key.endswith("dataset") else ""
            yield f"{key} = {toml_literal(name)}: must be one of {', '.join(known)}{hint}{did_you_mean(name, known)}"


def find_model(job: JobConfig) -> tuple[ModelArgs | None, list[str]]:
    """The model's arguments, with what the job's keys change of them, or None and why there are none.

    None without a problem means that the family may come from `experimental.custom_import` or from an installed
    package.
    """
    name = job.model.name
    if name not in families and (job.experimental.custom_import or _installed(name)):
        return None, []
    try:
        return _of_job(get_args(name, job.model.flavor), job), []
    except ConfigError as error:
        return None, list(error.problems)


def _of_job(args: ModelArgs, job: JobConfig) -> ModelArgs:
    """As `TrainSpec.args_for_job_fn` of the built-in families does, without the spec, which needs torch."""
    return args.for_job(job) if isinstance(args, DecoderArgs) else args


def _installed(name: str) -> bool:
    """Whether an installed package announces train specs under that name. It is not imported."""
    return any(point.name == name for point in entry_points(group=ENTRY_POINT_GROUP))
