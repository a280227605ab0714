"""Data that fail under a run, brought in by `experimental.custom_import` beside the tiny model.

DATA_FAILS = "how reads rank", once in a job: before so many documents have been read by a process of the rank ("all":
of any), a file vanishes, is cut off or grows, a record is bad, or a worker is killed. DATA_FAILED is where that is
noted. All this happens in DATA_HOME, where each rank has a folder named after it, which the dataset `own_copy` reads.
"""

import os
import signal
from pathlib import Path
from typing import Any

from components.data.documents import DatasetRequest, RandomAccess, bad_record
from components.data.files import open_files
from components.data.jsonlines import JsonLines
from components.data.registry import datasets
from tests.trainer import tiny

__all__ = ["tiny"]

usual = JsonLines.document
reads = 0


def fail(how: str, source: JsonLines, index: int) -> None:
    """Let the data be as `how` says."""
    file = Path(str(source.files[0]))
    if how == "vanish":
        file.rename(file.with_name("away"))
    elif how == "truncate":
        os.truncate(file, 100)
    elif how == "grow":
        with file.open("ab") as opened:
            opened.write(b"{}\n")
    elif how == "bad":
        raise bad_record(file, 1, 1, "no record, says the test")
    elif how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)


def failing(self: JsonLines, index: int) -> dict[str, Any]:
    """A document, unless its turn has come."""
    global reads
    if not str(self.files[0]).startswith(os.environ["DATA_HOME"]):
        return usual(self, index)
    reads += 1
    how, number, rank = os.environ["DATA_FAILS"].split()
    mark = Path(os.environ["DATA_FAILED"])
    if reads == int(number) and rank in ("all", os.environ["RANK"]) and not (mark / os.environ["RANK"]).exists():
        mark.mkdir(exist_ok=True)
        (mark / os.environ["RANK"]).touch()
        fail(how, self, index)
    return usual(self, index)


def own_copy(request: DatasetRequest) -> RandomAccess:
    """The files of this rank."""
    opened = open_files(f"{os.environ['DATA_HOME']}/{os.environ['RANK']}", request.fields)
    if not isinstance(opened, RandomAccess):
        raise TypeError(opened)
    return opened


if "own_copy" not in datasets:
    datasets.register("own_copy", own_copy)
    setattr(JsonLines, "document", failing)  # noqa: B010  # a class of ours, in a process of its own
