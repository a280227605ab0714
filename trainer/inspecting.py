"""The rows of a job as its model would see them, without the model: what `scripts/inspect_data.py` shows.

Everything is built by what builds it for training, from the TOML to the loader, as if one rank had all rows: so what is
shown are the job's own rows, those of any layout. Worker processes are left out, since they change nothing. What the
user asks to see is found by reading on from the start, or from a checkpoint; only rows that are numbered are found at
once.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import count, islice
from typing import Any, Literal

from components.checkpoint.contents import read_files
from components.checkpoint.manifest import read_manifest
from components.checkpoint.storage import open_folder
from components.config.data import Source
from components.config.job_config import JobConfig
from components.config.training import DataLoader, Training, Validation
from components.data.inspecting.pairs import PairView, pairs_of
from components.data.inspecting.survey import Survey
from components.data.inspecting.view import RowView, views
from components.data.loader import Loader
from components.data.names import name_of
from components.data.opening import Opener
from components.data.origins import Origin
from components.data.tokenizer import Tokenizer
from components.mesh.batch import IGNORE, Batch
from components.mesh.degrees import resolve_degrees
from components.runtime.errors import CheckpointError, ConfigError, DataError
from models.train_spec import families, get_args
from trainer.check import world_of
from trainer.command import import_custom, validate_job
from trainer.config.load import resolve
from trainer.settle import settle
from trainer.validator import sets_of

Unit = Literal["tokens", "documents"]
PAIRS = "preference"
HERE = DataLoader(num_workers=0, persistent_workers=False, pin_memory=False, prefetch_factor=None)


@dataclass(frozen=True)
class Position:
    """Where a checkpoint's job is in its data."""

    step: int
    """Steps that are done."""
    sizes: Mapping[str, int]
    """Sizes that the job had derived (`settle.sizes`)."""
    loader: Mapping[str, Any]
    """The loader's state."""


@dataclass
class Rows:
    """The rows of one set, from some step on."""

    tokenizer: Tokenizer
    loader: Loader
    only: str
    """What the only source is called."""
    unit: Unit
    """What the shares of sources are shares of."""
    shares: Mapping[str, float] = field(default_factory=dict)
    """The part of the mixture that each source should be; empty where nothing is mixed."""
    done: int = 0
    """Steps before the loader's position."""
    table: list[list[int]] = field(default_factory=list)
    """Cursors after the last step that has been read."""
    read: Mapping[str, int] | None = None
    """What of each source stood in the rows that have been passed over, if these were read."""

    def __iter__(self) -> Iterator[RowView]:
        """All rows of each step, in order. Raises DataError."""
        told: list[list[Origin] | None] = []
        can_tell = self.loader.listen(lambda row: told.append(None if row is None else [self._named(x) for x in row]))
        for step, rows in zip(count(self.done + 1), self.loader, strict=False):
            self.table = rows.cursors.tolist()
            origins = _with_padding(told, rows.batch) if can_tell else None
            told.clear()
            yield from views(rows.batch, step, origins)

    def had(self) -> Mapping[str, int]:
        """Tokens or documents of each source, from the job's first step to before the rows that come next.

        Cursors of streamed rows know of documents alone, or windows of them, that are done; so rows that are read on
        the way are counted instead.
        """
        if self.read is not None:
            return self.read
        found = self.loader.mixture(self.loader.state_dict([])["table"])
        return {name or self.only: number for name, number in found.items()}

    def _named(self, origin: Origin) -> Origin:
        """A job's only source has no name of its own."""
        return origin if origin.source else origin._replace(source=self.only)

    def go_to(self, step: int) -> None:
        """Let the rows begin with that step's. Raises ConfigError if it is passed already, DataError if the data end
        before it."""
        skip = step - 1 - self.done
        if skip < 0:
            raise ConfigError(
                f"--start-step {step}: the checkpoint is of step {self.done}; take {self.done + 1} or more"
            )
        state = self.loader.state_dict([])
        if state["kind"] == "indexed":
            first = state["table"][0][0] + skip * self.loader.global_batch
            self.loader.load_state({**state, "table": [[first]]})
        elif skip:
            self._read_on(step, skip)
        self.done = step - 1

    def _read_on(self, step: int, skip: int) -> None:
        sums = Survey(self.unit, before=self.had())
        for view in islice(self, skip * self.loader.global_batch):
            sums.add(view)
        if (passed := sums.rows // self.loader.global_batch) < skip:
            raise DataError(f"--start-step {step}: the data end after step {self.done + passed}")
        self.read = sums.served
        self.loader.load_state(self.loader.state_dict(self.table))


def _with_padding(told: Sequence[list[Origin] | None], batch: Batch) -> list[list[Origin] | None]:
    """What was told of a step's rows, and nothing of those that are padding alone, of which nothing is told."""
    if len(told) == batch.rows:
        return list(told)
    empty = ((batch.tokens == 0) & (batch.labels == IGNORE)).all(dim=1).tolist()
    rows = iter(told)
    return [[] if nothing else next(rows) for nothing in empty]


@dataclass(frozen=True)
class Inspected:
    """What there is to show of a job."""

    name: str
    """What it is, for a heading."""
    tokenizer: Tokenizer
    rows: Rows | None
    """None where all sources, or the validation set, are preference pairs, which no rows are made of."""
    pairs: Sequence[Iterator[PairView]] = ()
    """The pairs of each such source."""


def open_data(
    argv: Sequence[str], environ: Mapping[str, str], *, validation: str | None = None, checkpoint: str | None = None
) -> Inspected:
    """The data of the job that the arguments name, on the ranks that NGPU and NNODES say.

    Args:
        validation: Name of a validation set; empty: the first; None: the training set.
        checkpoint: Folder of a checkpoint of this job, whose position in the data the rows begin from.

    Raises ConfigError, DataError, CheckpointError as training would, but for preference pairs, which it refuses.
    """
    words = [*argv, "--validation.enable=true"] if validation is not None else argv
    resolved, ranks = resolve(words, environ), world_of(environ)
    import_custom(resolved.job.experimental.custom_import)
    validate_job(replace(resolved, job=_pairs_as_chats(resolved.job)), ranks)
    position = None if checkpoint is None else read_position(checkpoint)
    degree = resolve_degrees(resolved.job.parallelism, ranks).batch
    job, _ = settle(resolved.job, degree, position.sizes if position else {})
    job = _without_workers(job)
    if validation is None:
        return _training(job, position)
    name, section = _choose(job, validation)
    job = replace(job, validation=section)
    tokenizer = families[job.model.name].load().build_tokenizer_fn(job)
    title = f"validation set {name} of {job.job.description}"
    if pairs := _pairs(job, section, tokenizer, section.sources):
        return Inspected(title, tokenizer, None, pairs)
    rows = Rows(tokenizer, _loader(job, tokenizer, validation=True), name, job.data.unit)
    return Inspected(title, tokenizer, rows)


def _training(job: JobConfig, position: Position | None) -> Inspected:
    title, tokenizer = (
        f"training data of {job.job.description}",
        families[job.model.name].load().build_tokenizer_fn(job),
    )
    pairs = _pairs(job, job.training, tokenizer, job.data.sources)
    sources = [source for source in job.data.sources if source.kind != PAIRS]
    if pairs and not sources:
        return Inspected(title, tokenizer, None, pairs)
    job = replace(job, data=replace(job.data, sources=sources))
    only = name_of(sources[0]) if sources else job.training.dataset
    total = sum(source.weight for source in sources)
    shares = {name_of(source): source.weight / total for source in sources}
    rows = Rows(tokenizer, _loader(job, tokenizer), only, job.data.unit, shares)
    if position:
        rows.loader.load_state(position.loader)
        rows.done = position.step
    return Inspected(title, tokenizer, rows, pairs)


def _pairs(
    job: JobConfig, section: Training | Validation, tokenizer: Tokenizer, sources: Sequence[Source]
) -> list[Iterator[PairView]]:
    """The pairs of each source that holds such."""
    opener = Opener(job, section, tokenizer, get_args(job.model.name, job.model.flavor).vocab_size)
    return [pairs_of(opener, source) for source in sources if source.kind == PAIRS]


def _loader(job: JobConfig, tokenizer: Tokenizer, validation: bool = False) -> Loader:
    build = families[job.model.name].load().build_dataloader_fn
    vocab_size = get_args(job.model.name, job.model.flavor).vocab_size
    return build(job, tokenizer=tokenizer, vocab_size=vocab_size, data_rank=0, data_degree=1, validation=validation)


def _pairs_as_chats(job: JobConfig) -> JobConfig:
    """For the rules on tables, which refuse to train on pairs."""

    def chats(sources: Sequence[Source]) -> list[Source]:
        return [replace(source, kind="chat") if source.kind == PAIRS else source for source in sources]

    data = replace(job.data, sources=chats(job.data.sources))
    return replace(job, data=data, validation=replace(job.validation, sources=chats(job.validation.sources)))


def _without_workers(job: JobConfig) -> JobConfig:
    training, validation = replace(job.training, dataloader=HERE), replace(job.validation, dataloader=HERE)
    return replace(job, training=training, validation=validation)


def _choose(job: JobConfig, name: str) -> tuple[str, Validation]:
    """A validation set and its name. Raises ConfigError."""
    sets = sets_of(job.validation)
    if name and name not in sets:
        raise ConfigError(f"--validation {name}: no such validation set; there are: {', '.join(sets)}")
    name = name or next(iter(sets))
    return name, sets[name]


def read_position(folder: str) -> Position:
    """Where the job of a checkpoint is in its data. Raises CheckpointError if the folder is none that can say."""
    place = open_folder(folder)
    manifest = read_manifest(place)
    if manifest.kind != "training":
        raise CheckpointError(f"'{folder}': holds weights alone and knows nothing of data; give one to resume from")
    _, state = read_files(place, manifest)
    sizes, loader = manifest.layout.get("sizes"), state.get("dataloader")
    if not isinstance(sizes, dict) or not isinstance(loader, dict):
        raise CheckpointError(f"'{folder}': does not say where its job is in the data: it is of another version")
    return Position(manifest.step, sizes, loader)


def survey(rows: Rows, shown: int, counted: int) -> tuple[list[RowView], Survey | None]:
    """The first `shown` rows, and the sums over the first `counted`; None without any."""
    kept: list[RowView] = []
    sums = Survey(rows.unit, before=rows.had())
    for number, view in zip(range(max(shown, counted)), rows, strict=False):
        if number < shown:
            kept.append(view)
        if number < counted:
            sums.add(view)
    return kept, sums if sums.rows else None
