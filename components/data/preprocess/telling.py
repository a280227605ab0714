"""What a person sees of a job: a progress bar on a terminal, and a few lines at the end."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from components.data.preprocess.inputs import Position
from components.data.preprocess.job import Job, Show
from components.data.preprocess.output import Progress


class Bar:
    """A progress bar on standard error, if that is a terminal. A context manager through `bar()`."""

    def __init__(self) -> None:
        self._bar: Any = None

    def begin(self, job: Job, position: Position) -> Show:
        """Show the bar; gives what is to be told of progress."""
        if not sys.stderr.isatty():
            return lambda read, progress: None
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

        columns = [TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn()]
        self._bar = Progress(*columns, console=Console(stderr=True), refresh_per_second=2, transient=True)
        task = self._bar.add_task("reading", total=job.size)
        self._bar.start()
        return lambda read, progress: self._bar.update(task, completed=read, description=counts(progress))

    def end(self) -> None:
        """Take it away."""
        if self._bar is not None:
            self._bar.stop()


@contextmanager
def bar() -> Iterator[Bar]:
    """A bar that is taken away at the end, whatever happens."""
    shown = Bar()
    try:
        yield shown
    finally:
        shown.end()


def counts(progress: Progress) -> str:
    """How far a job is."""
    tokens = sum(progress.tokens.values())
    speed = f"{tokens / progress.seconds:,.0f}" if progress.seconds else "n/a"
    return f"{progress.documents:,} documents, {tokens:,} tokens, {speed} tokens/s"


def summary(report: dict[str, Any]) -> str:
    """A report in lines."""
    lines = []
    for made in report["outputs"].values():
        empty = f", {made['empty_documents']:,} of them empty" if made["empty_documents"] else ""
        lines.append(
            f"{made['path']}: {report['documents']:,} documents{empty}; {made['tokens']:,} tokens, {made['bytes']:,}"
            f" bytes ({report['dtype']})"
        )
    if report["dropped"]:
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in sorted(report["dropped"].items()))
        lines.append(f"dropped {sum(report['dropped'].values()):,} records: {kinds}; the first of them:")
        lines += [f"  {x}" for x in report["first_dropped"]]
    speed = report["tokens_per_second"]
    lines.append(f"{report['seconds']:,.1f} s" + (f", {speed:,} tokens/s" if speed else ""))
    return "\n".join(lines)
