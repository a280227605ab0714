"""From the sections of a job to its tokenizer and its loaders: the defaults of a TrainSpec."""

from components.config.job_config import JobConfig
from components.config.training import Training, Validation
from components.data.documents import DatasetRequest
from components.data.encoding import TextEncoder
from components.data.indexed import IndexedRows, RowIndex
from components.data.loader import Loader
from components.data.mixture import StreamSource
from components.data.order import deal
from components.data.packing import Packing
from components.data.registry import open_dataset
from components.data.rows import Ending, RowSource
from components.data.streamed import StreamedRows
from components.data.tokenizer import Tokenizer, load_tokenizer
from components.runtime.errors import ConfigError


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

    `tokenizer` may be None for datasets that make rows themselves (`synthetic`). `vocab_size` is the model's.
    Validation visits the documents once, in their own order, and pads the end, whatever `[data]` says of shuffling.
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
    validation = isinstance(section, Validation)
    seed = job.debug.seed or 0
    field = job.data.text_field
    request = DatasetRequest(section.dataset_path, field, section.seq_len, vocab_size, seed, validation, (field,))
    ending: Ending = "pad" if validation else job.data.on_end
    opened = open_dataset(section.dataset, request)
    if isinstance(opened, RowIndex):
        if isinstance(section, Validation) and section.steps == -1 and opened.count is None:
            raise ConfigError(
                f"validation.steps = -1: the dataset {section.dataset!r} has no end; set a number of steps"
            )
        return IndexedRows(
            opened,
            global_batch=rows,
            document_mask=job.data.document_mask,
            ending=ending,
            cross_document_labels=job.data.cross_document_labels,
        )
    if tokenizer is None:
        raise ConfigError(f"dataset {section.dataset!r}: its documents need a tokenizer; set model.hf_assets_path")
    if tokenizer.vocab_size > vocab_size:
        raise ConfigError(
            f"the tokenizer has {tokenizer.vocab_size} entries, the model's vocabulary {vocab_size};"
            " choose a flavor with a larger vocabulary, or another model.hf_assets_path"
        )
    streams = rows if validation or job.data.streams == -1 else job.data.streams
    dealt = deal(
        opened,
        name="",
        streams=streams,
        seed=None if validation or not job.data.shuffle else seed,
        epochs=None if ending == "repeat" else 1,
        window=job.data.shuffle_window,
    )
    encoder = TextEncoder(tokenizer, job.data.text_field, add_bos=job.data.add_bos, add_eos=job.data.add_eos)
    packing = _packing(job, section)
    # what the meaning of a cursor depends on: not how the data end, nor what is done about bad records
    fingerprint = {**opened.fingerprint, **dealt.fingerprint, **encoder.fingerprint, **packing.fingerprint}
    return StreamedRows(
        [StreamSource("", dealt, encoder)],
        packing,
        ending=ending,
        skip_bad=job.data.on_bad_record == "skip",
        fingerprint=fingerprint,
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
