"""Rows and their sums as text: in colour for a terminal, else with brackets around what no loss is taken at."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any, NamedTuple

from components.data.inspecting.marked import Mark, harmless, heading, marks, title
from components.data.inspecting.pairs import PairView
from components.data.inspecting.survey import Survey, percent
from components.data.inspecting.view import Piece, RowView
from components.data.tokenizer import Tokenizer
from components.mesh.batch import IGNORE

if TYPE_CHECKING:
    from rich.text import Text

WIDTH = 120
BAR = 40
"""Characters of a histogram's longest bar."""


class Styled(NamedTuple):
    """Text in one style of STYLES; empty: as it is."""

    text: str
    style: str = ""


STYLES: Mapping[str, str] = {
    "title": "bold",
    "border": "cyan",
    "trained": "green",
    "masked": "bright_black",
    "trained special": "bold magenta",
    "masked special": "magenta",
    "label": "yellow",
}
"""Styles → what rich calls them."""

LEGEND = (
    Styled("a loss is taken at this text; ", "trained"),
    Styled("⟪", "bracket"),
    Styled("at this none", "masked"),
    Styled("⟫", "bracket"),
    Styled("; →only predicted←", "label"),
    Styled("; ↵ ends a line\n"),
)


def row_text(view: RowView, tokenizer: Tokenizer) -> Iterator[Styled]:
    """A row as running text."""
    yield Styled(f"{title(view)}\n", "title")
    for number, piece in enumerate(view.pieces):
        yield Styled(f"── {heading(piece, number)}\n", "border")
        if not piece.padding:
            yield from piece_text(view, piece, tokenizer)
            yield Styled("\n")
    yield Styled("\n")


def piece_text(view: RowView, piece: Piece, tokenizer: Tokenizer) -> Iterator[Styled]:
    """What a row holds of one document."""
    for (target, label), run in groupby(marks(view, piece, tokenizer), lambda mark: (mark.target, mark.label)):
        yield from _run(list(run), target, label)


def _run(run: list[Mark], target: bool, label: bool) -> Iterator[Styled]:
    """Tokens of one kind. The brackets have no style, by which `plain` and a terminal tell them from text."""
    if label:
        yield Styled(f"→{''.join(_lines(mark.text) for mark in run)}←", "label")
        return
    name = "trained" if target else "masked"
    yield Styled("" if target else "⟪", "bracket")
    for special, same in groupby(run, lambda mark: mark.special):
        yield Styled("".join(_lines(mark.text) for mark in same), f"{name} special" if special else name)
    yield Styled("" if target else "⟫", "bracket")


def _lines(text: str) -> str:
    return text.replace("\n", "↵\n")


def row_table(view: RowView, tokenizer: Tokenizer) -> Iterator[Styled]:
    """A row with a line for each token: place, position, id, text, label."""
    yield Styled(f"{title(view)}\n", "title")
    yield Styled(f"{'place':>7} {'position':>9} {'token':>8} {'label':>8}  text\n", "border")
    for number, piece in enumerate(view.pieces):
        yield Styled(f"── {heading(piece, number)}\n", "border")
        for mark in marks(view, piece, tokenizer) if not piece.padding else ():
            if not mark.label:
                yield _token_line(view, mark)
    yield Styled("\n")


def _token_line(view: RowView, mark: Mark) -> Styled:
    place = mark.place
    label = "-" if view.labels[place] == IGNORE else str(view.labels[place])
    shown = mark.text.replace("\t", "\\t").replace("\n", "\\n")
    name = "trained" if mark.target else "masked"
    return Styled(
        f"{place:>7} {view.positions[place]:>9} {view.tokens[place]:>8} {label:>8}  '{shown}'\n",
        f"{name} special" if mark.special else name,
    )


def survey_text(survey: Survey, shares: Mapping[str, float]) -> Iterator[Styled]:
    """The sums. `shares`: the part of the mixture that each source should be, where there are several."""
    yield Styled(f"{survey.rows:,} rows, {survey.places:,} places\n", "title")
    tokens = survey.places - survey.padding
    for name, number in (("tokens", tokens), ("padding", survey.padding), ("trained", survey.trained)):
        yield Styled(f"  {name:<8} {number:>12,} {percent(number, survey.places):>8}\n")
    if survey.sources:
        yield Styled("sources\n", "title")
        yield from (Styled(f"{line}\n") for line in _table(survey.source_rows(shares)))
    what = "documents that begin in these rows" if survey.whole else "pieces of documents, cut where rows cut them"
    yield Styled(f"lengths in tokens of {what}\n", "title")
    most = max((number for _, _, number in survey.histogram()), default=0)
    for low, high, number in survey.histogram():
        bar = "#" * -(-number * BAR // most)
        yield Styled(f"  {f'{low:,}–{high:,}' if high > low else f'{low:,}':>15} {number:>9,} {bar}".rstrip() + "\n")


def _table(rows: list[tuple[str, ...]]) -> list[str]:
    """Lines with columns as wide as they must be."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(["", row[0].ljust(widths[0]), *(x.rjust(w) for x, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]


def everything(
    name: str,
    shown: Sequence[RowView],
    survey: Survey | None,
    shares: Mapping[str, float],
    tokenizer: Tokenizer,
    row: Callable[[RowView, Tokenizer], Iterator[Styled]] = row_text,
) -> Iterator[Styled]:
    """Rows, one after the other as `row` shows them, and then the sums."""
    yield Styled(f"{harmless(name)}\n", "title")
    if shown and row is row_text:
        yield from LEGEND
    yield Styled("\n")
    for view in shown:
        yield from row(view, tokenizer)
    if survey is not None:
        yield from survey_text(survey, shares)


def plain(styled: Iterable[Styled]) -> str:
    """Without colour, with brackets."""
    return "".join(text for text, _ in styled)


def show(styled: Iterable[Styled], colour: bool) -> None:
    """Print, in colour with rich."""
    if not colour:
        print(plain(styled), end="")
        return
    from rich.console import Console

    Console(highlight=False, emoji=False, markup=False).print(_rich(styled, colour), soft_wrap=True, end="")


def _rich(styled: Iterable[Styled], colour: bool) -> "Text":
    from rich.text import Text

    parts = [(part.text, STYLES.get(part.style, "")) for part in styled if not (colour and part.style == "bracket")]
    return Text.assemble(*parts)


def show_pairs(pairs: Sequence[PairView], tokenizer: Tokenizer, colour: bool) -> None:
    """Print pairs, each side by side; WIDTH columns if it is not known how wide the terminal is."""
    from rich.console import Console
    from rich.table import Table

    options: dict[str, Any] = {} if colour else {"color_system": None, "width": WIDTH}
    console = Console(highlight=False, emoji=False, markup=False, **options)
    for number, pair in enumerate(pairs):
        table = Table(title=harmless(f"pair {number}: {pair.source}, {pair.where}"), title_justify="left", expand=True)
        sides = {"chosen": pair.chosen, "rejected": pair.rejected}
        for name, view in sides.items():
            table.add_column(f"{name}: {len(view.tokens):,} tokens, {view.trained:,} trained", ratio=1)
        table.add_row(*(_rich(piece_text(view, view.pieces[0], tokenizer), colour) for view in sides.values()))
        console.print(table)
