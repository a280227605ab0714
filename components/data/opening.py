"""From a table of sources to documents and what makes tokens of them.

`training.dataset` is the short form of a table, without a name: so its documents keep the order that they had before
there were tables.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from components.config.data import Source
from components.config.job_config import JobConfig
from components.config.training import Training, Validation
from components.data.chat.encoder import ChatEncoder
from components.data.chat.template import ChatTemplate, load_chat_template
from components.data.documents import DatasetRequest, RandomAccess, Sequential
from components.data.encoding import Encoder, TextEncoder, TokensEncoder
from components.data.fim import FimEncoder, find_marks
from components.data.indexed import RowIndex
from components.data.instruction import build_instruction_encoder, columns_of
from components.data.names import DATASETS, name_of
from components.data.registry import datasets, open_dataset, open_path
from components.data.shares import is_shares
from components.data.splits import take_share, take_tokens
from components.data.token_files import open_tokens
from components.data.token_paths import is_tokens
from components.data.token_rows import Tokens
from components.data.token_shards import Marks
from components.data.tokenizer import Tokenizer
from components.runtime.errors import ConfigError, DataError

USUAL = Source()
OF_TEXT = ("fim_rate", "fim_spm_rate", "fim_tokens", "text_field", "subset")
"""Keys of a source that do nothing where it turns out to be token files."""
OF_DOCUMENTS = ("kind", "fim_rate", "fim_spm_rate", "fim_tokens", "text_field")
"""Keys of a source that do nothing where its dataset turns out to make whole rows."""


@dataclass(frozen=True)
class Opened:
    """A source of one job."""

    name: str
    """How it is called; "" for the short form."""
    documents: RandomAccess | Sequential | RowIndex
    """Its documents, or where it makes whole rows itself, those."""
    encoder: Encoder | None
    """Makes tokens of documents; None for rows."""
    weight: float
    """Share in the mixture."""
    epochs: int | None
    """Passes over the documents; None: `data.on_end` decides."""
    tokens: Tokens | None = None
    """The same documents, where they are token files: what rows can be indexed by."""


@dataclass(frozen=True)
class Opener:
    """Opens the sources of training or of validation."""

    job: JobConfig
    section: Training | Validation
    tokenizer: Tokenizer | None
    vocab_size: int
    """Entries of the model's vocabulary."""

    @property
    def validation(self) -> bool:
        """Whether it opens what is held out."""
        return isinstance(self.section, Validation)

    @property
    def part(self) -> int:
        """Which of a source's shares it opens."""
        return 1 if self.validation else 0

    def all(self) -> list[Opened]:
        """Every source, in the order of the tables. Raises ConfigError and DataError."""
        section = self.section
        tables = section.sources if isinstance(section, Validation) else self.job.data.sources
        if not tables:
            return [self.open(Source(dataset=section.dataset, path=section.dataset_path), "")]
        return [self.open(table, name_of(table)) for table in tables]

    def open(self, source: Source, name: str) -> Opened:
        """One source. Raises ConfigError and DataError, which name it."""
        with _named(name):
            return self._open(source, name)

    def _open(self, source: Source, name: str) -> Opened:
        path = source.path if _gives_way(source.dataset) else None
        if path is not None and self.finds_tokens(source, path):
            return self.open_tokens(source, path, name)
        if path is not None and source.kind != "tokens" and is_tokens(path):
            raise ConfigError(f'source {name!r}: kind = "{source.kind}": {path} holds tokens; leave kind out')
        documents = self.documents(source)
        if isinstance(documents, RowIndex):
            self.check_rows(source, name)
            return Opened(name, documents, None, source.weight, source.epochs)
        if source.split is not None and is_shares(source.split):
            documents = self.share(documents, source.split, name)
        return Opened(name, documents, self.encoder(source, name), source.weight, source.epochs)

    def finds_tokens(self, source: Source, path: str) -> bool:
        """Whether the path is one of token files."""
        return source.kind == "tokens" or (source.kind == "auto" and is_tokens(path))

    def open_tokens(self, source: Source, path: str, name: str) -> Opened:
        """A source of token files. Where Megatron-LM's order is wanted, their sequences are its documents, as there.

        In validation too, which would otherwise count something else, and might read what is trained on.
        """
        for key in OF_TEXT:
            value = getattr(source, key)
            if value != getattr(USUAL, key):
                raise ConfigError(
                    f"source {name!r}: {key} = {value!r}: is for text, and {path} holds tokens; leave it out, or give"
                    " the text"
                )
        files = open_tokens(path, Marks(None if self.tokenizer is None else self.tokenizer.eos_id))
        sequences = self.job.data.order == "megatron"
        part = take_tokens(files, source.split, self.part, split_of(name), sequences=sequences)
        return Opened(name, part, TokensEncoder(self.vocab_size), source.weight, source.epochs, part)

    def check_rows(self, source: Source, name: str) -> None:
        """Raises ConfigError for a key that does nothing to rows which a dataset makes itself."""
        what = f"source {name!r}" if name else f"dataset {source.dataset!r}"
        wrong = [key for key in OF_DOCUMENTS if getattr(source, key) != getattr(USUAL, key)]
        if source.split is not None and is_shares(source.split):
            wrong.append("split")
        if wrong:
            raise ConfigError(
                f"{what}: {wrong[0]} = {getattr(source, wrong[0])!r}: is for documents, and its dataset makes whole"
                " rows; leave it out"
            )
        packing = self.job.data.packing
        if packing != "concat" and not self.validation:
            raise ConfigError(
                f'{what}: data.packing = "{packing}": its dataset makes whole rows, which are not packed; set it to'
                ' "concat"'
            )

    def documents(self, source: Source) -> RandomAccess | Sequential | RowIndex:
        """Those of a registered dataset, or those at a path."""
        split = None if source.split is None or is_shares(source.split) else source.split
        request = DatasetRequest(
            source.path,
            source.text_field or self.job.data.text_field,
            self.section.seq_len,
            self.vocab_size,
            self.job.debug.seed or 0,
            self.validation,
            self.fields(source),
            split,
            source.subset,
        )
        if source.dataset is None and source.path is not None:
            return open_path(source.path, request)
        return open_dataset(source.dataset or "", request)

    def fields(self, source: Source) -> Sequence[str] | None:
        """The columns that will be read; None: all."""
        match source.kind:
            case "auto" | "text":
                return (source.text_field or self.job.data.text_field,)
            case "instruction":
                return columns_of(source.prompt, source.answer, source.system)
        return None

    def share(self, documents: RandomAccess | Sequential, split: str, name: str) -> RandomAccess:
        """The part of the documents that this section reads."""
        if isinstance(documents, RandomAccess):
            return take_share(documents, split, self.part, split_of(name))
        raise DataError(
            f"{split_of(name)} = {split!r}: needs documents that can be counted, which compressed files and streams"
            " cannot; hold out files of their own, or write them as plain files"
        )

    def encoder(self, source: Source, name: str) -> Encoder:
        """What makes tokens of its records. Raises ConfigError without a tokenizer that fits the model."""
        if source.kind == "tokens":
            return TokensEncoder(self.vocab_size)
        tokenizer = self.fitting_tokenizer(name)
        match source.kind:
            case "auto" | "text":
                return self.text_encoder(source, tokenizer, name)
            case "chat":
                return ChatEncoder(
                    tokenizer,
                    self.template(source, name),
                    messages_field=source.messages_field,
                    tools_field=source.tools_field,
                    train_on=source.train_on,
                )
            case "preference":
                raise ConfigError(
                    f"source {name!r}: there is no loss of pairs yet; look at them with scripts/inspect_data.py"
                )
        template = load_chat_template(self.assets, source.chat_template)
        return build_instruction_encoder(source, tokenizer, template, add_bos=self.job.data.add_bos)

    def text_encoder(self, source: Source, tokenizer: Tokenizer, name: str) -> TextEncoder:
        """What makes tokens of text, rearranged to fill in the middle where that is wanted."""
        data = self.job.data
        field = source.text_field or data.text_field
        if not source.fim_rate:
            return TextEncoder(tokenizer, field, add_bos=data.add_bos, add_eos=data.add_eos)
        return FimEncoder(
            tokenizer,
            field,
            marks=find_marks(tokenizer, source.fim_tokens, name),
            rate=source.fim_rate,
            spm_rate=source.fim_spm_rate,
            seed=self.job.debug.seed or 0,
            source=name,
            add_bos=data.add_bos,
            add_eos=data.add_eos,
        )

    def template(self, source: Source, name: str) -> ChatTemplate:
        """The source's own chat template, else the tokenizer's. Raises ConfigError if there is none."""
        found = load_chat_template(self.assets, source.chat_template)
        if found is None:
            raise ConfigError(
                f"source {name!r}: the tokenizer in {self.assets} has no chat template; set chat_template to a file"
                " that holds one, or take the tokenizer of a model that was trained on chats"
            )
        return found

    @property
    def assets(self) -> str:
        """The tokenizer's folder."""
        return self.job.model.tokenizer_path or self.job.model.hf_assets_path

    def fitting_tokenizer(self, name: str) -> Tokenizer:
        """The job's tokenizer. Raises ConfigError if there is none, or none that fits the model."""
        if self.tokenizer is None:
            what = f"source {name!r}" if name else f"dataset {self.section.dataset!r}"
            raise ConfigError(f"{what}: its documents need a tokenizer; set model.hf_assets_path")
        if self.tokenizer.vocab_size > self.vocab_size:
            raise ConfigError(
                f"the tokenizer has {self.tokenizer.vocab_size} entries, the model's vocabulary {self.vocab_size};"
                " choose a flavor with a larger vocabulary, or another model.hf_assets_path"
            )
        return self.tokenizer


def _gives_way(dataset: str | None) -> bool:
    """Whether a path takes the place of the dataset: one that a module registers does with a path what it likes."""
    return dataset not in datasets or (dataset in DATASETS and dataset != "synthetic")


@contextmanager
def _named(name: str) -> Iterator[None]:
    """Has errors say which source they are about, where they do not and it has a name."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(*(_told(name, x) for x in error.problems)) from error
    except DataError as error:
        raise DataError(_told(name, str(error))) from error


def _told(name: str, text: str) -> str:
    called = f"source {name!r}"
    return text if not name or called in text else f"{called}: {text}"


def split_of(name: str) -> str:
    """What messages call a source's shares."""
    return f"split of source {name!r}"
