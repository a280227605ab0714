"""Documents over which a worker process dies or their source fails, brought in by `experimental.custom_import`.

The variable BREAKS says how, FROM at which record; BROKEN_FILE remembers that it has happened.
"""

import os
import signal
from pathlib import Path
from typing import Any

from components.data.jsonlines import JsonLines
from tests.trainer import tiny

__all__ = ["tiny"]

document = JsonLines.document


def breaking(self: JsonLines, index: int) -> dict[str, Any]:
    """A document, unless its reader breaks over it."""
    file = Path(os.environ["BROKEN_FILE"])
    if index == int(os.environ["FROM"]) and os.environ["BREAKS"] and not file.exists():
        file.touch()
        if os.environ["BREAKS"] == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        raise LookupError("no such word")
    return document(self, index)


setattr(JsonLines, "document", breaking)  # noqa: B010  # a class of ours, in a process of its own
