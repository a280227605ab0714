"""Documents over which a worker process dies or a tokenizer fails, brought in by `experimental.custom_import`.

The variable BREAKS says how, FROM at which document of the order; BROKEN_FILE remembers that it has happened.
"""

import os
import signal
from pathlib import Path

from components.data import streamed
from components.data.order import Document
from tests.trainer import tiny

__all__ = ["tiny"]

tokens = streamed.StreamedRows._tokens


def breaking(self: streamed.StreamedRows, document: Document) -> object:
    """A document's tokens, unless its reader breaks over it."""
    file = Path(os.environ["BROKEN_FILE"])
    if document.position == int(os.environ["FROM"]) and os.environ["BREAKS"] and not file.exists():
        file.touch()
        if os.environ["BREAKS"] == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        raise LookupError("no such word")
    return tokens(self, document)


setattr(streamed.StreamedRows, "_tokens", breaking)  # noqa: B010  # a class of ours, in a process of its own
