"""From the sections of a job to its tokenizer and its loaders: the defaults of a TrainSpec."""

from collections.abc import Sequence
from typing import Any

from components.config.job_config import JobConfig
from components.config.training import Training, Validation
from components.data.index_cache import IndexCache
from components.data.indexed import IndexedRows, RowIndex
from components.data.loader import Loader
from components.data.megatron_rows import MegatronRows
from components.data.mixture import StreamSource
from components.data.native_rows import NativeRows
from components.data.opening import Opened, Opener
from components.data.order import deal
from components.data.packing import Packing
from components.data.rows import Ending, RowSource
from components.data.streamed import StreamedRows
from components.data.token_rows import TokenSource
from components.data.tokenizer import Tokenizer, load_tokenizer
from components.runtime.errors import ConfigError

AT_ONCE = 10**10
"""Tokens that the order of token files is worked out for when a job starts, which takes seconds; the rest follows as it
is needed."""


def build_tokenizer(job: JobConfig) -> Tokenizer:
    """The tokenizer in `model.tokenizer_path` or `model.hf_assets_path`. Raises DataError."""
    return load_tokenizer(job.model.tokenizer_path or job.model.hf_assets_path)


def build_loader(
    job: JobConfig,
    *,
    tokenizer: Tokenizer | None,
    data_rank: int,
    data_degree: int,
    vocab_size: int,
    validation: bool = False,
) -> Loader:
    """The loader of one data-parallel rank, for training or validation.

    `tokenizer` may be None for sources that hold tokens already. `vocab_size` is the model's. Validation visits the
    documents once, in their own order, and pads the end, whatever `[data]` says of shuffling.
    Raises ConfigError and DataError.
    """
    section = job.validation if validation else job.training
    rows = section.global_batch_size
    rows = section.local_batch_size * data_degree if rows == -1 else rows
    source = _source(job, section, tokenizer, rows, vocab_size)
    return Loader(
        source, global_batch=rows, data_rank=data_rank, data_degree=data_degree, dataloader=section.dataloader
    )


def _source(
    job: JobConfig, section: Training | Validation, tokenizer: Tokenizer | None, rows: int, vocab_size: int
) -> RowSource:
    opened = Opener(job, section, tokenizer, vocab_size).all()
    ending: Ending = "pad" if isinstance(section, Validation) else job.data.on_end
    if ending == "repeat" and all(x.epochs is not None for x in opened):
        ending = "stop"
    index = _index(job, section, opened, ending, rows, vocab_size)
    if index is None:
        return _streamed(job, section, opened, ending, rows)
    return IndexedRows(
        index,
        global_batch=rows,
        document_mask=job.data.document_mask,
        ending=ending,
        cross_document_labels=job.data.cross_document_labels,
    )


def _index(
    job: JobConfig,
    section: Training | Validation,
    opened: Sequence[Opened],
    ending: Ending,
    rows: int,
    vocab_size: int,
) -> RowIndex | None:
    """What gives rows by their number; None if they have to be made one after the other."""
    made = [x for x in opened if isinstance(x.documents, RowIndex)]
    if made:
        return _made_rows(section, made[0], opened)
    sources = [TokenSource(x.name, x.tokens, x.weight, x.epochs) for x in opened if x.tokens is not None]
    megatron = job.data.order == "megatron" and isinstance(section, Training)
    if len(sources) < len(opened) or job.data.packing != "concat":
        if megatron:
            other = next(x for x in opened if x.tokens is None)
            raise ConfigError(
                f'data.order = "megatron": source {other.name!r} is not made of token files; write them with'
                ' scripts/preprocess_data.py, or set data.order = "native"'
            )
        return None
    cache, seed = IndexCache(job.data.cache_folder), job.debug.seed or 0
    if megatron:
        samples = job.training.steps * rows
        return MegatronRows(
            sources, seq_len=section.seq_len, samples=samples, seed=seed, cache=cache, vocab_size=vocab_size
        )
    return NativeRows(
        sources,
        seq_len=section.seq_len,
        rows=min(max(section.steps, 1) * rows, AT_ONCE // section.seq_len),
        seed=seed if job.data.shuffle and isinstance(section, Training) else None,
        ending=ending,
        unit=job.data.unit,
        cache=cache,
        vocab_size=vocab_size,
    )


def _made_rows(section: Training | Validation, source: Opened, opened: Sequence[Opened]) -> RowIndex:
    """The rows of a dataset that makes them itself. Raises ConfigError for those that cannot be had."""
    index = source.documents
    if not isinstance(index, RowIndex) or len(opened) > 1:
        raise ConfigError(
            f"source {source.name!r}: its dataset makes whole rows, which cannot be mixed with others; make it the only"
            " source"
        )
    if source.epochs is not None:
        raise ConfigError(f"source {source.name!r}: epochs = {source.epochs}: it has rows, not documents; leave it out")
    if isinstance(section, Validation) and section.steps == -1 and index.count is None:
        name = source.name or section.dataset
        raise ConfigError(f"validation.steps = -1: the dataset {name!r} has no end; set a number of steps")
    return index


def _streamed(
    job: JobConfig, section: Training | Validation, opened: Sequence[Opened], ending: Ending, rows: int
) -> StreamedRows:
    data, held_out = job.data, isinstance(section, Validation)
    streams = rows if held_out or data.streams == -1 else data.streams
    sources, facts = list[StreamSource](), dict[str, dict[str, Any]]()
    for source in opened:
        if isinstance(source.documents, RowIndex) or source.encoder is None:
            raise ConfigError(f"source {source.name!r}: gives rows, which cannot be packed")
        dealt = deal(
            source.documents,
            name=source.name,
            streams=streams,
            seed=None if held_out or not data.shuffle else job.debug.seed or 0,
            epochs=1 if source.epochs is None and ending != "repeat" else source.epochs,
            window=data.shuffle_window,
        )
        sources.append(StreamSource(source.name, dealt, source.encoder, source.weight))
        own = {"weight": source.weight, "epochs": source.epochs} if source.name else {}
        facts[source.name] = {**own, **source.documents.fingerprint, **dealt.fingerprint, **source.encoder.fingerprint}
    packing = _packing(job, section)
    ordered = facts.get("") or {"unit": data.unit, "sources": facts}
    if packing.kind == "best_fit":  # what a window at the end holds
        ordered |= {"on_end": ending}
    return StreamedRows(
        sources,
        packing,
        unit=data.unit,
        ending=ending,
        skip_bad=data.on_bad_record == "skip",
        fingerprint=packing.fingerprint | ordered,
    )


def _packing(job: JobConfig, section: Training | Validation) -> Packing:
    data = job.data
    return Packing(
        section.seq_len,
        document_mask=data.document_mask,
        cross_document_labels=data.cross_document_labels,
        kind=data.packing,
        window=data.packing_window,
        long_documents=data.long_documents,
    )
