"""What a run prints while it trains, on stdout: one line per report, and on a terminal a progress bar below them.

Lines have the same columns on a terminal and in a pipe, so that what one sees is what one can grep. rich is imported
only for a terminal: a run in a cluster's log does not pay for it.
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any

from components.metrics.step import StepMetrics

if TYPE_CHECKING:
    from rich.console import Console

UNKNOWN = "n/a"


def number(value: float | None, width: int, digits: int) -> str:
    """A number that may not be known, in a column."""
    return UNKNOWN.rjust(width) if value is None else f"{value:.{digits}f}".rjust(width)


def figures(metrics: StepMetrics, total_steps: int) -> list[tuple[str, str]]:
    """The columns of a step line: names and values of constant width."""
    memory = f"{metrics.memory_gib:6.2f} GiB"
    if metrics.memory_share is not None:
        memory += f" ({metrics.memory_share:3.0%})"
    return [
        ("step", f"{metrics.step:{len(str(total_steps))}d}"),
        ("loss", number(metrics.loss, 8, 5)),
        ("max_loss", number(metrics.max_loss, 8, 5)),
        ("grad_norm", number(metrics.grad_norm, 8, 4)),
        ("lr", f"{metrics.lr:.2e}"),
        ("tokens/s", f"{metrics.tokens_per_second:8.0f}"),
        ("tflops", f"{metrics.tflops:7.3f}"),
        ("mfu", UNKNOWN if metrics.mfu is None else f"{metrics.mfu:.1%}"),
        ("memory", memory),
        ("data", f"{metrics.data_wait:.1%}"),
    ]


def step_line(metrics: StepMetrics, total_steps: int) -> str:
    """One report as one line."""
    return "  ".join(f"{name} {value}" for name, value in figures(metrics, total_steps))


def validation_line(metrics: StepMetrics) -> str:
    """The validation that belongs to a report."""
    sets = "".join(f"  {name} {number(loss, 0, 5)}" for name, loss in metrics.validation_losses.items())
    return f"validation  step {metrics.step}  loss {number(metrics.validation_loss, 0, 5)}{sets}"


def lines(metrics: StepMetrics, total_steps: int) -> list[str]:
    """All lines of a report."""
    return [step_line(metrics, total_steps), *([validation_line(metrics)] if metrics.validated else [])]


class PipeSink:
    """Prints lines and nothing else."""

    def __init__(self, total_steps: int) -> None:
        self._total = total_steps

    def log(self, metrics: StepMetrics) -> None:
        """Print a report."""
        for line in lines(metrics, self._total):
            print(line, flush=True)

    def note(self, event: dict[str, Any]) -> None:
        """Nothing: what a reader must know of an event is a log message."""

    def advance(self, step: int) -> None:
        """Nothing."""

    def rewind(self, step: int) -> None:
        """Nothing: what was printed was so."""

    def close(self) -> None:
        """Nothing."""


class TerminalSink:
    """Prints lines, and below them a bar with the time that is left and the newest figures, which stays in place."""

    def __init__(self, total_steps: int, start_step: int, console: Console) -> None:
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        self._total, self._console = total_steps, console
        self._bar = Progress(
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("steps · loss {task.fields[loss]} · {task.fields[rate]} tokens/s ·"),
            TimeElapsedColumn(),
            TextColumn("· ETA"),
            TimeRemainingColumn(),
            console=console,
            expand=True,
            redirect_stderr=sys.stderr.isatty(),  # a log that goes to a file shall still go there
        )
        self._task = self._bar.add_task("", total=total_steps, completed=start_step, loss="…", rate="…")
        self._bar.start()

    def log(self, metrics: StepMetrics) -> None:
        """Print a report above the bar, and its figures in it."""
        from rich.text import Text

        pairs = figures(metrics, self._total)
        parts = [(f"{name} ", "dim", value, "bold" if name in ("step", "loss") else "") for name, value in pairs]
        line = Text("  ").join(Text.assemble((name, low), (value, high)) for name, low, value, high in parts)
        self._console.print(line, soft_wrap=True)
        if metrics.validated:
            self._console.print(Text(validation_line(metrics), "green"), soft_wrap=True)
        rate = f"{metrics.tokens_per_second:.0f}"
        self._bar.update(self._task, completed=metrics.step, loss=number(metrics.loss, 0, 4), rate=rate)

    def note(self, event: dict[str, Any]) -> None:
        """Nothing: what a reader must know of an event is a log message."""

    def advance(self, step: int) -> None:
        """Move the bar."""
        self._bar.update(self._task, completed=step)

    def rewind(self, step: int) -> None:
        """Move the bar back."""
        self._bar.update(self._task, completed=step)

    def close(self) -> None:
        """Leave the bar as it is, and give the cursor back."""
        self._bar.stop()


def console_sink(total_steps: int, start_step: int, plain: bool) -> PipeSink | TerminalSink:
    """A bar and colours if stdout is a terminal that can move its cursor, else lines.

    `plain` (`metrics.disable_color_printing`) keeps the bar and drops the colours, as the variable NO_COLOR does.
    """
    if not sys.stdout.isatty() or os.environ.get("TERM") == "dumb":
        return PipeSink(total_steps)
    from rich.console import Console

    return TerminalSink(total_steps, start_step, Console(no_color=plain or None, highlight=False))
