"""Rules on `[[data.sources]]` and `[[validation.sources]]`: does each table say what it needs, and nothing that it
ignores?

A key of a table that would do nothing is refused rather than listed as inactive: a table says one thing of one source,
and a `prompt` on a text source is a mistake about its kind. What only the files can tell is found when they are opened.
"""

from collections import Counter
from collections.abc import Iterator

from components.config.annotations import toml_literal
from components.config.data import Source
from components.config.job_config import JobConfig
from components.config.nearest import did_you_mean
from components.data.names import DATASETS, name_of
from components.data.shares import is_shares, parse_shares
from components.runtime.errors import ConfigError

USUAL = Source()
CHATS = ("chat", "instruction", "squad", "hellaswag")
KINDS_OF_KEYS = {
    "text_field": ("auto", "text"),
    "messages_field": ("chat",),
    "tools_field": ("chat",),
    "prompt": ("instruction",),
    "answer": ("instruction",),
    "system": ("instruction", "squad", "hellaswag"),
    "chat_template": (*CHATS, "preference"),
    "train_on": CHATS,
    "fim_rate": ("auto", "text"),
    "fim_spm_rate": ("auto", "text"),
    "fim_tokens": ("auto", "text"),
}
"""Keys that only some kinds of sources read."""


def check_sources(job: JobConfig) -> Iterator[str]:
    """A line for each problem, led by the dotted key of its table."""
    yield from _tables(job, "data.sources", job.data.sources)
    if job.validation.enable:
        yield from _tables(job, "validation.sources", job.validation.sources)
        for i, source in enumerate(job.validation.sources):
            if source.epochs is not None:
                why = "validation reads its documents once; leave it out"
                yield f"validation.sources[{i}].epochs = {source.epochs}: {why}"
            if source.weight != USUAL.weight:
                why = "validation reads every set, whatever its share; leave it out"
                yield f"validation.sources[{i}].weight = {source.weight}: {why}"
        yield from _pairs("validation.sources", job.validation.sources, "judge by", "take")
    yield from _pairs("data.sources", job.data.sources, "train on them with", "train on")
    yield from _replaced(job)
    yield from _order(job)
    yield from _labels(job)


def _pairs(key: str, sources: list[Source], use: str, take: str) -> Iterator[str]:
    for i, source in enumerate(sources):
        if source.kind == "preference":
            yield (
                f'{key}[{i}].kind = "preference": there is no loss of pairs to {use} yet; look at them with'
                f" scripts/inspect_data.py, or {take} the chosen answers as a chat"
            )


def _replaced(job: JobConfig) -> Iterator[str]:
    """A path of the short form beside a table would be ignored; a dataset's name has a default, and is."""
    sections = {"training": (job.data.sources, job.training.dataset_path)}
    if job.validation.enable:
        sections["validation"] = (job.validation.sources, job.validation.dataset_path)
    for section, (sources, path) in sections.items():
        if sources and path is not None:
            tables = "[[data.sources]]" if section == "training" else "[[validation.sources]]"
            why = f"{tables} take its place; name it there, or leave it out"
            yield f"{section}.dataset_path = {toml_literal(path)}: {why}"


def _tables(job: JobConfig, key: str, sources: list[Source]) -> Iterator[str]:
    for i, source in enumerate(sources):
        for line in _table(job, source):
            yield f"{key}[{i}]{line}"
    counts = Counter(name_of(source) for source in sources)
    for i, source in enumerate(sources):
        name = name_of(source)
        if counts[name] > 1:
            yield f"{key}[{i}].name: {counts[name]} sources are called {name!r}; give each a name of its own"
        if not name.isprintable():  # a terminal that shows it would obey some
            why = "which has characters that do not print; give it a name without such"
            yield f"{key}[{i}].name: the source is called {name!r}, {why}"


def _table(job: JobConfig, source: Source) -> Iterator[str]:
    """Problems of one table; each line goes on from its key."""
    if source.dataset is None and source.path is None:
        yield ": does not say where its documents are: set path, or dataset to a registered name"
    elif source.path is None and source.dataset not in DATASETS and not job.experimental.custom_import:
        known = f"must be one of {', '.join(DATASETS)} (or give path){did_you_mean(source.dataset or '', DATASETS)}"
        yield f".dataset = {toml_literal(source.dataset)}: {known}"
    for key, kinds in KINDS_OF_KEYS.items():
        value = getattr(source, key)
        if value != getattr(USUAL, key) and source.kind not in kinds:
            named = " or ".join(toml_literal(kind) for kind in kinds)
            why = f"only sources of kind {named} read it, and this is {toml_literal(source.kind)}"
            yield f".{key} = {toml_literal(value)}: {why}"
    if source.kind == "instruction":
        for key in ("prompt", "answer"):
            if getattr(source, key) is None:
                yield f'.{key}: is missing: say what it is made of, with columns in braces, such as "{{question}}"'
    yield from _fim(source)
    if source.split is not None and is_shares(source.split):
        try:
            parse_shares(source.split, ".split")
        except ConfigError as error:
            yield str(error)


def _fim(source: Source) -> Iterator[str]:
    if not source.fim_rate and source.kind in KINDS_OF_KEYS["fim_rate"]:
        for key in ("fim_spm_rate", "fim_tokens"):
            value = getattr(source, key)
            if value != getattr(USUAL, key):
                why = "does nothing while fim_rate is 0; set fim_rate, or leave it out"
                yield f".{key} = {toml_literal(value)}: {why}"
    if source.fim_tokens and len(source.fim_tokens) != 3:
        yield f".fim_tokens = {toml_literal(source.fim_tokens)}: must be the tokens before prefix, suffix and middle"


def _order(job: JobConfig) -> Iterator[str]:
    data, order = job.data, 'data.order = "megatron"'
    if data.order != "megatron":
        return
    if not data.sources and job.training.dataset_path is None:
        yield f"{order}: is an order of indexed token files; name them in [[data.sources]]"
    if data.packing != "concat":
        yield f'{order}: its samples are cut from one stream; set data.packing = "concat", not "{data.packing}"'
    if data.unit != "tokens":
        yield f'data.unit = "documents": with {order} samples are blended; set it to "tokens", or data.order = "native"'
    for i, source in enumerate(data.sources):
        if source.kind not in ("auto", "tokens"):
            yield f'data.sources[{i}].kind = "{source.kind}": {order} reads indexed token files only'
        if source.epochs is not None:
            why = "repeats a source as often as its weight needs; leave it out"
            yield f"data.sources[{i}].epochs = {source.epochs}: {order} {why}"


def _labels(job: JobConfig) -> Iterator[str]:
    if not job.data.cross_document_labels:
        return
    if job.data.document_mask:
        yield (
            "data.cross_document_labels = true: data.document_mask hides a document from the next one, which therefore"
            " cannot be predicted from it; set one of them to false"
        )
    if job.data.packing != "concat":
        yield f'data.cross_document_labels = true: needs data.packing = "concat", not "{job.data.packing}"'
