"""Where documents come from, how they are mixed, ordered and made into rows: `[data]` and its `[[data.sources]]`."""

from dataclasses import dataclass, field
from typing import Literal

from components.config.types import AllOrPositive, Fraction, NonEmpty, Positive, PositiveInt

Kind = Literal["auto", "text", "tokens", "chat", "instruction", "squad", "hellaswag", "preference"]


@dataclass(frozen=True)
class Source:
    """One `[[data.sources]]` or `[[validation.sources]]` table: documents of one origin, and how they are read."""

    name: str = ""
    """How reports and messages call it; each name once, of characters that print. Empty: the dataset's name, or the
    last part of the path."""
    dataset: str | None = None
    """Registered name of the dataset, as in `training.dataset`; needs no `path`."""
    path: NonEmpty | None = None
    """File, folder, glob or URL; the prefix of an indexed token file; or a Hugging Face dataset."""
    kind: Kind = "auto"
    """What a record is. `auto`: token ids where the files hold such, else text."""
    weight: Positive = 1.0
    """Share in the mixture, relative to the other sources'. Not in validation, which reads every set."""
    epochs: PositiveInt | None = None
    """Passes over the documents after which the source leaves the mixture. None: `data.on_end` decides."""
    split: NonEmpty | None = None
    """Name of a Hugging Face split; or shares such as "98,1,1" of the documents in file order, of which training reads
    the first and validation the second."""
    subset: NonEmpty | None = None
    """Subset (configuration) of a Hugging Face dataset."""
    text_field: str | None = None
    """Field or column of a text record; None: `data.text_field`."""
    messages_field: str | None = None
    """Field that holds a chat; None: `messages` or `conversations`, whichever is there."""
    tools_field: str = "tools"
    """Field that holds a chat's tool definitions, where a record has it."""
    prompt: str | None = None
    """Instruction: what the user says, with columns in braces: "{question}\\n{context}"."""
    answer: str | None = None
    """Instruction: what is to be learnt, likewise."""
    system: str | None = None
    """Instruction: the system's turn, likewise; None: there is none."""
    chat_template: str | None = None
    """File of a Jinja template that turns a chat into text; None: the tokenizer's own."""
    train_on: Literal["assistant", "last", "all"] = "assistant"
    """Chats and instructions: the loss is on what the assistant says, on its last turn only, or on everything."""
    fim_rate: Fraction = 0.0
    """Text: share of documents that are rearranged to fill in the middle (FIM)."""
    fim_spm_rate: Fraction = 0.5
    """Of those, the share that has the suffix first (SPM) rather than the prefix (PSM)."""
    fim_tokens: list[str] = field(default_factory=list)
    """Tokens before prefix, suffix and middle, in that order. Empty: those of the tokenizer that are known by name."""


@dataclass(frozen=True)
class Data:
    """`[data]`: the order and the shape of the rows. All of it belongs to the job's fingerprint."""

    sources: list[Source] = field(default_factory=list)
    """Tables `[[data.sources]]`, mixed by weight. Empty: `training.dataset` is the only source."""
    unit: Literal["tokens", "documents"] = "tokens"
    """What weights are shares of."""
    order: Literal["native", "megatron"] = "native"
    """Order of indexed token files: drawn from `debug.seed` in each epoch, or exactly Megatron-LM's samples and
    blending."""
    packing: Literal["concat", "best_fit", "padded"] = "concat"
    """How documents become rows: one after the other and cut where a row is full; whole, put together where they fit
    best; or each in a row of its own."""
    packing_window: PositiveInt = 32
    """Best fit: rows' worth of documents that are looked at together. More fill rows better, and cost memory and time
    at a resume."""
    long_documents: Literal["split", "truncate", "truncate_left", "drop", "error"] = "split"
    """A document longer than a row, where packing does not cut: cut into rows, keep its begin, keep its end, leave it
    out and count it, or stop."""
    cross_document_labels: bool = False
    """A document's last token predicts the next one's first, as in Megatron-LM without `--eod-mask-loss`. Not with
    `document_mask`."""
    cache_folder: str | None = None
    """Where indices of token files are kept between jobs. None: the user's cache folder."""
    streams: AllOrPositive = -1
    """Streams that documents are dealt to, row r of a batch coming from stream r. −1: the job's largest global batch.
    Saved with the job."""
    shuffle: bool = True
    """Visit documents in an order drawn from `debug.seed`, anew in each epoch."""
    shuffle_window: PositiveInt = 10000
    """Sources without random access are permuted within windows of so many documents; the window is read again on
    resume."""
    on_end: Literal["repeat", "stop"] = "repeat"
    """At the end of the data: start the next epoch, or end the run cleanly before the first step that could not be
    filled."""
    on_bad_record: Literal["error", "skip"] = "error"
    """A record that cannot be read: stop with its file:line:column, or skip and count it."""
    text_field: str = "text"
    """Field or column that holds a document's text."""
    add_bos: bool = True
    """Put the tokenizer's begin token before each document, where it has one."""
    add_eos: bool = True
    """Put the tokenizer's end token after each document, where it has one."""
    document_mask: bool = False
    """Attention and positions stop at document borders."""
