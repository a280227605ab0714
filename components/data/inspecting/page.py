"""Rows and their sums as one HTML file that needs nothing else and runs nothing.

Whatever comes from data is escaped, and a policy in the file forbids scripts and anything from elsewhere, so that a
document that is a page itself stays text in whatever reads the file.
"""

from collections.abc import Iterator, Mapping, Sequence
from html import escape

from components.data.inspecting.marked import Mark, harmless, heading, marks, title
from components.data.inspecting.pairs import PairView
from components.data.inspecting.survey import Survey, percent
from components.data.inspecting.view import Piece, RowView
from components.data.tokenizer import Tokenizer
from components.mesh.batch import IGNORE

POLICY = "default-src 'none'; style-src 'unsafe-inline'"
STYLE = """
:root { color-scheme: light dark; font: 14px/1.5 system-ui, sans-serif; }
body { margin: 2rem auto; max-width: 70rem; padding: 0 1rem; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin: 2rem 0 0.5rem; }
table { border-collapse: collapse; } th, td { padding: 0 0.75rem 0 0; text-align: right; }
th:first-child, td:first-child { text-align: left; }
td.bar { text-align: left; width: 24rem; } td.bar div { background: #2a9d8f; height: 0.8rem; }
.document { border-left: 3px solid #2a9d8f; margin: 0.5rem 0; padding-left: 0.75rem; }
table.pair { table-layout: fixed; width: 100%; } table.pair td { text-align: left; vertical-align: top; }
.document p { color: #2a9d8f; margin: 0; }
pre { font: 13px/1.6 ui-monospace, monospace; margin: 0; white-space: pre-wrap; word-break: break-word; }
i { background: #2a9d8f30; font-style: normal; } i:nth-child(even) { background: #2a9d8f18; }
i.masked { background: none; opacity: 0.55; } i.special { font-weight: bold; color: #b5179e; }
i.label { border-bottom: 2px dotted; color: #b8860b; }
"""
LEGEND = (
    '<pre><i>a loss is taken at this token</i> <i class="masked">at this none</i> <i class="special">a special token'
    '</i> <i class="label">only predicted, at the row\'s end</i></pre>'
)


def page(
    name: str,
    views: Sequence[RowView],
    survey: Survey | None,
    shares: Mapping[str, float],
    tokenizer: Tokenizer,
    pairs: Sequence[PairView] = (),
) -> str:
    """The file's text. `name`: what the rows are of; `shares`: see `survey_text`."""
    parts = [*_head(name)]
    if survey is not None:
        parts += _survey(survey, shares)
    parts += [LEGEND, *_rows(views, tokenizer), *_pairs(pairs, tokenizer), "</body></html>"]
    return "".join(f"{part}\n" for part in parts)


def _head(name: str) -> Iterator[str]:
    yield "<!DOCTYPE html>"
    yield '<html lang="en"><head><meta charset="utf-8">'
    yield f'<meta http-equiv="Content-Security-Policy" content="{escape(POLICY)}">'
    yield f"<title>{escape(name)}</title><style>{STYLE}</style></head><body>"
    yield f"<h1>{escape(name)}</h1>"


def _rows(views: Sequence[RowView], tokenizer: Tokenizer) -> Iterator[str]:
    for view in views:
        yield f"<h2>{escape(title(view))}</h2>"
        for number, piece in enumerate(view.pieces):
            yield _document(view, piece, number, tokenizer)


def _pairs(pairs: Sequence[PairView], tokenizer: Tokenizer) -> Iterator[str]:
    for number, pair in enumerate(pairs):
        yield f"<h2>pair {number}: {escape(harmless(f'{pair.source}, {pair.where}'))}</h2>"
        sides = {"chosen": pair.chosen, "rejected": pair.rejected}
        heads = (f"{name}: {len(view.tokens):,} tokens, {view.trained:,} trained" for name, view in sides.items())
        cells = (f"<td><pre>{_said(view, view.pieces[0], tokenizer)}</pre></td>" for view in sides.values())
        yield f'<table class="pair">{_cells(*heads, tag="th")}<tr>{"".join(cells)}</tr></table>'


def _survey(survey: Survey, shares: Mapping[str, float]) -> Iterator[str]:
    tokens = survey.places - survey.padding
    yield f"<h2>{survey.rows:,} rows, {survey.places:,} places</h2><table>"
    for what, number in (("tokens", tokens), ("padding", survey.padding), ("trained", survey.trained)):
        yield _cells(what, f"{number:,}", percent(number, survey.places))
    yield "</table>"
    if survey.sources:
        yield "<h2>Sources</h2><table>"
        rows = survey.source_rows(shares)
        yield _cells(*rows[0], tag="th")
        yield from (_cells(*row) for row in rows[1:])
        yield "</table>"
    yield f"<h2>Lengths in tokens of {'documents that begin here' if survey.whole else 'pieces of documents'}</h2>"
    most = max((number for _, _, number in survey.histogram()), default=0)
    yield "<table>"
    for low, high, number in survey.histogram():
        cells = _cells(f"{low:,}–{high:,}" if high > low else f"{low:,}", f"{number:,}").removesuffix("</tr>")
        yield f'{cells}<td class="bar"><div style="width:{100 * number // most}%"></div></td></tr>'
    yield "</table>"


def _cells(*texts: str, tag: str = "td") -> str:
    return f"<tr>{''.join(f'<{tag}>{escape(text)}</{tag}>' for text in texts)}</tr>"


def _document(view: RowView, piece: Piece, number: int, tokenizer: Tokenizer) -> str:
    said = "" if piece.padding else _said(view, piece, tokenizer)
    return f'<div class="document"><p>{escape(heading(piece, number))}</p><pre>{said}</pre></div>'


def _said(view: RowView, piece: Piece, tokenizer: Tokenizer) -> str:
    return "".join(_token(view, mark) for mark in marks(view, piece, tokenizer))


def _token(view: RowView, mark: Mark) -> str:
    place = mark.place
    kinds = [name for name, on in (("special", mark.special), ("label", mark.label), ("masked", not mark.target)) if on]
    about = f"label {view.labels[place]} of place {place}"
    if not mark.label:
        label = "none" if view.labels[place] == IGNORE else view.labels[place]
        about = f"token {view.tokens[place]}, place {place}, position {view.positions[place]}, label {label}"
    kind = f' class="{" ".join(kinds)}"' if kinds else ""
    return f'<i{kind} title="{about}">{escape(mark.text).replace(chr(10), "↵" + chr(10))}</i>'
