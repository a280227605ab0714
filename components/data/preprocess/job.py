"""One job: which files, which tokenizer, what a record becomes, and where it goes.

`preprocess` runs it on this machine's cores. Anything else that applies `Job.encoder.encode_chunk` to `Job.chunks(...)`
and gives the results in order to `Job.fill` writes the same bytes.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from math import inf
from typing import Any

import numpy as np

from components.data.paths import find_path
from components.data.preprocess.encode import ChunkEncoder, EncodedChunk, Recipe
from components.data.preprocess.inputs import Chunk, Position, StandardInput, chunks, find_inputs, fingerprint
from components.data.preprocess.output import Output, Progress
from components.data.preprocess.pool import Pool
from components.data.token_index import token_dtype
from components.data.tokenizer import Tokenizer, load_tokenizer
from components.runtime.errors import ConfigError, DataError, EspalierError

DTYPES = ("uint8", "int8", "int16", "uint16", "int32", "int64")
CHUNK_BYTES = 1 << 20
MOST_WORKERS = 1024
Encode = Callable[[Iterable[Chunk]], Iterable[EncodedChunk]]
"""Encodes chunks, and gives them back in their order."""
Show = Callable[[int, Progress], None]
"""Is told, after each chunk, how many bytes of the input have been read, and what has become of them."""


class Stopped(EspalierError):
    """The job was asked to stop; what it had written is kept."""


@dataclass(frozen=True)
class Options:
    """What a job is given."""

    inputs: tuple[str, ...]
    """Files, folders, globs; `-` is standard input."""
    output: str
    """Prefix of the files that are written."""
    tokenizer: str
    """Folder with tokenizer.json."""
    keys: tuple[str, ...] = ("text",)
    """Fields or columns that are encoded, each into files of its own."""
    append_eod: bool = True
    """End each document with the tokenizer's end token."""
    prepend_bos: bool = False
    """Begin each with its begin token."""
    eod_token: str | None = None
    """End token by its text; None: the tokenizer's own."""
    bos_token: str | None = None
    """Begin token likewise."""
    dtype: str | None = None
    """Of the tokens; None: by the vocabulary, as Megatron-LM does."""
    on_bad_record: str = "error"
    """`error` or `skip`."""
    plain: bool = False
    """One key: name the files by the prefix alone, without `_KEY_document`."""
    overwrite: bool = False
    """Replace what is there."""
    save_every: float = 10.0
    """Seconds after which what was written is made durable."""


class Job:
    """What the options stand for. Raises DataError where they cannot be."""

    def __init__(self, options: Options) -> None:
        self.options = options
        _check(options)
        self.inputs = find_inputs(options.inputs)
        self.tokenizer = open_tokenizer(options.tokenizer)
        self.encoder = ChunkEncoder(self.tokenizer, self._recipe())

    @property
    def names(self) -> dict[str, str]:
        """Path without extension of each key's files."""
        keys, output = self.options.keys, self.options.output
        return {x: output if self.options.plain else f"{output}_{x}_document" for x in keys}

    @property
    def size(self) -> int | None:
        """Bytes of the input; None where nobody knows."""
        return None if self._once else sum(x.size for x in self.inputs)

    @cached_property
    def fingerprint(self) -> dict[str, str]:
        """What the output is made of, by name. `on_bad_record` may change: it stops a run, or does not."""
        recipe = self.encoder.recipe
        return {
            "inputs": f"standard input, read at {time.time()}" if self._once else fingerprint(self.inputs),
            "keys": ", ".join(recipe.keys),
            "tokenizer": self.tokenizer.fingerprint,
            "version of tokenizers": version("tokenizers"),
            "begin token": str(recipe.bos),
            "end token": str(recipe.eod),
            "dtype": recipe.dtype,
            "names": "plain" if self.options.plain else "with keys",
        }

    def open(self) -> Output:
        """The output, where an earlier run has left it. Raises DataError."""
        options = self.options
        return Output(options.output, self.names, self.encoder.recipe.dtype, self.fingerprint, options.overwrite)

    def chunks(self, position: Position) -> Iterator[Chunk]:
        """The input from there on. Raises DataError."""
        return chunks(self.inputs, self.options.keys, CHUNK_BYTES, position)

    def fill(
        self,
        output: Output,
        encode: Encode,
        stop: Callable[[], bool] = lambda: False,
        show: Show = lambda read, progress: None,
    ) -> None:
        """Encode what is left and write it. Raises Stopped, DataError, and what `encode` raises.

        What was written before any of them is kept for the next run, but for what could not be written.
        """
        began, before = time.monotonic(), output.progress.seconds
        saved = began
        results = iter(encode(self.chunks(output.progress.position)))
        while (done := self._next(output, results, stop)) is not None:
            output.write(done)
            now = time.monotonic()
            output.progress.seconds = before + now - began
            show(self._read(done.chunk), output.progress)
            if now - saved >= self.options.save_every:
                output.save()
                saved = time.monotonic()
        output.progress.seconds = before + time.monotonic() - began

    def report(self, progress: Progress) -> dict[str, Any]:
        """What is told at the end, as JSON values."""
        recipe = self.encoder.recipe
        itemsize, seconds = np.dtype(recipe.dtype).itemsize, round(progress.seconds, 3)
        total = sum(progress.tokens.values())
        return {
            "documents": progress.documents,
            "characters": progress.characters,
            "outputs": {
                key: {
                    "path": name,
                    "tokens": progress.tokens[key],
                    "bytes": progress.tokens[key] * itemsize,
                    "empty_documents": progress.empty[key],
                }
                for key, name in self.names.items()
            },
            "dtype": recipe.dtype,
            "dropped": progress.dropped,
            "first_dropped": progress.bad,
            "seconds": seconds,
            "tokens_per_second": round(total / seconds) if seconds else None,
            "made_of": self.fingerprint,
            "input": list(self.options.inputs),
        }

    @property
    def _once(self) -> bool:
        return isinstance(self.inputs[0].file, StandardInput)

    def _next(self, output: Output, results: Iterator[EncodedChunk], stop: Callable[[], bool]) -> EncodedChunk | None:
        """The next chunk; None after the last."""
        try:
            done = next(results, None)
            if stop():
                again = "standard input cannot be read again" if self._once else "run the same command again to go on"
                raise Stopped(f"{self.options.output}: stopped after {output.progress.documents} documents; {again}")
            if done is not None and done.bad and not self.encoder.recipe.skip:
                bad = done.bad[0]
                mend = "mend the record, or drop such records with --on-bad-record skip"
                raise DataError(f"{bad.where(output.progress.lines_before(done.chunk))}: {bad.what}; {mend}")
        except EspalierError:
            output.save()
            raise
        return done

    def _read(self, chunk: Chunk) -> int:
        return self._ends[chunk.first] + chunk.read

    @cached_property
    def _ends(self) -> list[int]:
        """Bytes of the input before each file."""
        return np.cumsum([0, *(x.size for x in self.inputs)]).tolist()

    def _recipe(self) -> Recipe:
        options, tokenizer = self.options, self.tokenizer
        bos = (
            _special(options, tokenizer, "begin", options.bos_token, tokenizer.bos_id) if options.prepend_bos else None
        )
        eod = _special(options, tokenizer, "end", options.eod_token, tokenizer.eos_id) if options.append_eod else None
        return Recipe(options.keys, bos, eod, _dtype(options.dtype, tokenizer), options.on_bad_record == "skip")


def preprocess(
    options: Options,
    workers: int,
    stop: Callable[[], bool] = lambda: False,
    show: Callable[[Job, Position], Show] = lambda job, position: lambda read, progress: None,
) -> dict[str, Any]:
    """Run a job on this machine, or go on with it where it was stopped; its report.

    Args:
        workers: Threads that encode, in processes of their own; 0: this one does, one chunk after the other.
        stop: Asked several times a second whether to stop.
        show: Given the job and where it begins: what is told of its progress.

    Raises Stopped, WorkerDied, DataError; ConfigError for more workers than any machine has cores.
    """
    if workers > MOST_WORKERS:
        raise ConfigError(f"--workers {workers}: allowed are 0 to {MOST_WORKERS}; more than cores gain nothing")
    job = Job(options)
    with closing(job.open()) as output:
        if not output.finishing:
            told = show(job, output.progress.position)
            if workers:
                with Pool(job.encoder, workers, stop) as pool:
                    job.fill(output, pool.map, stop, told)
            else:
                job.fill(output, lambda chunks: map(job.encoder.encode_chunk, chunks), stop, told)
            for known in job.inputs:
                known.file.check()
        return output.finish(job.report(output.progress))


def _check(options: Options) -> None:
    """Raises DataError."""
    keys = options.keys
    if not keys or len(set(keys)) < len(keys) or any(not x or "/" in x for x in keys):
        raise DataError(f"--keys {','.join(keys)}: give one or more different names, none with a slash")
    if options.plain and len(keys) > 1:
        raise DataError(f"--plain: {len(keys)} keys need names of their own; leave it out, or give one key")
    if not 0 <= options.save_every < inf:  # nan is no number of seconds either
        raise DataError(f"--save-every {options.save_every}: give seconds from 0 on, not infinitely many")


def open_tokenizer(path: str) -> Tokenizer:
    """The tokenizer in a folder, which its tokenizer.json may be named for. Raises DataError."""
    folder = path.removesuffix("tokenizer.json").removesuffix("/") or "."
    found = find_path(folder)
    if found is None or not (found / "tokenizer.json").is_file():
        raise DataError(f"--tokenizer {path}: no folder with a tokenizer.json in it")
    return load_tokenizer(folder)


def _special(options: Options, tokenizer: Tokenizer, which: str, text: str | None, own: int | None) -> int:
    """Id of a begin or end token. Raises DataError if there is none."""
    flag, leave = ("--bos-token", "leave --prepend-bos out") if which == "begin" else ("--eod-token", "--no-append-eod")
    if text is not None:
        try:
            own = Tokenizer(tokenizer.definition, eos=text).eos_id
        except DataError as error:
            raise DataError(f"{flag} {text}: the tokenizer has no such token; give one that it has") from error
    if own is None:
        raise DataError(f"--tokenizer {options.tokenizer}: names no {which} token; give one with {flag}, or {leave}")
    return own


def _dtype(name: str | None, tokenizer: Tokenizer) -> str:
    """Type of the tokens. Raises DataError if it does not hold all ids."""
    if name is None:
        return token_dtype(tokenizer.vocab_size).name
    if name not in DTYPES:
        raise DataError(f"--dtype {name}: no such type; allowed: {', '.join(DTYPES)}")
    largest = int(np.iinfo(name).max)
    if tokenizer.vocab_size - 1 > largest:
        raise DataError(
            f"--dtype {name}: holds ids up to {largest}, but the tokenizer has {tokenizer.vocab_size - 1}; leave it out"
            f" for {token_dtype(tokenizer.vocab_size).name}"
        )
    return name
