"""Rows taken apart, added up, and shown as text and as a page."""

from html.parser import HTMLParser

import pytest
import torch

from components.data.inspecting.marked import harmless
from components.data.inspecting.page import POLICY, page
from components.data.inspecting.survey import Survey
from components.data.inspecting.terminal import everything, plain, row_table, row_text, show, survey_text
from components.data.inspecting.view import RowView, texts, views
from components.data.origins import Origin
from components.mesh.batch import IGNORE, Batch
from tests.components.data.corpus import tokenizer

BOS, EOS = 0, 1


def batch(*rows: tuple[list[int], list[int], list[int]]) -> Batch:
    """Rows of (tokens, labels, documents)."""
    tokens, labels, ids = (torch.tensor(x) for x in zip(*rows, strict=True))
    return Batch(tokens, labels, torch.arange(tokens.shape[1]).expand_as(tokens), ids)


def row(documents: list[str], length: int, masked: int = 0) -> tuple[list[int], list[int], list[int]]:
    """Whole documents between begin and end, padding after them; no loss at the first `masked` tokens of the text."""
    tokens: list[int] = []
    labels: list[int] = []
    ids: list[int] = []
    for number, text in enumerate(documents):
        own = [BOS, *tokenizer().encode(text), EOS]
        tokens += own
        labels += [*[IGNORE] * masked, *own[masked + 1 :], IGNORE]
        ids += [number] * len(own)
    missing = length - len(tokens)
    return tokens + [0] * missing, labels + [IGNORE] * missing, ids + [len(documents)] * missing


def origin(name: str, where: str, offset: int, length: int) -> Origin:
    return Origin(name, where, offset, length)


def view(documents: list[str], length: int, masked: int = 0, origins: list[Origin] | None = None) -> RowView:
    return next(views(batch(row(documents, length, masked)), 3, None if origins is None else [origins]))


@pytest.mark.parametrize("text", ["def f(x):\n", "naïve — 日本語 👩‍👩‍👧 e\u0301\n\n", " x", ""])
def test_what_tokens_say_makes_up_the_text(text: str) -> None:
    ids = tokenizer().encode(text)
    said = texts(tokenizer(), ids)
    assert ("".join(said), len(said)) == (text, len(ids))


def test_a_character_belongs_to_the_last_of_its_tokens() -> None:
    ids = tokenizer().encode("€")
    assert (len(ids), texts(tokenizer(), ids)) == (3, ["", "", "€"])
    assert texts(tokenizer(), ids[:2]) == ["", "\ufffd"]  # cut by a row's end
    assert texts(tokenizer(), [*ids[1:], *ids]) == ["", "", "", "", "\ufffd\ufffd€"]


def test_ids_that_the_tokenizer_has_not() -> None:
    ids = tokenizer().encode("a b")
    assert texts(tokenizer(), [*ids, 5000, *ids]) == ["a", " b", "⟨5000⟩", "a", " b"]


def test_what_a_row_is_made_of() -> None:
    found = view(["x y", "z"], 10, masked=1)
    assert [(x.start, x.stop, x.padding) for x in found.pieces] == [(0, 4, False), (4, 7, False), (7, 10, True)]
    assert (found.step, found.row, found.trained, found.padding) == (3, 0, 3, 3)
    assert found.targets.tolist() == [False, False, True, True, False, False, True, False, False, False]
    assert found.further == {}
    cut = view(["x y z"], 5)
    assert [(x.start, x.stop, x.padding) for x in cut.pieces] == [(0, 5, False)]


def test_labels_that_are_not_the_next_token() -> None:
    found = next(views(batch(([5, 6, 7, 8], [6, 9, 8, 4], [0, 0, 1, 1])), 1))
    assert found.further == {1: 9, 3: 4}
    assert found.targets.tolist() == [False, True, False, True]


def test_a_first_token_of_number_0_is_no_padding() -> None:
    found = next(views(batch(([5, 1, 0], [1, IGNORE, 77], [0, 0, 1])), 1))
    assert [piece.padding for piece in found.pieces] == [False, False]
    nothing = next(views(batch(([0, 0], [IGNORE, IGNORE], [0, 0])), 1))
    assert ([piece.padding for piece in nothing.pieces], nothing.padding, nothing.documents) == ([True], 2, ())


def test_where_origins_are_known_they_tell_padding() -> None:
    zeros = batch(([0, 0, 0], [IGNORE] * 3, [0, 0, 1]))
    a, b = origin("a", "a:1", 0, 2), origin("b", "b:1", 0, 9)
    assert [x.padding for x in next(views(zeros, 1, [[a, b]])).pieces] == [False, False]
    assert [(x.padding, x.origin) for x in next(views(zeros, 1, [[a]])).pieces] == [(False, a), (True, None)]


TEXT = """\
step 3, row 0: 12 places, 2 documents, 6 trained, 2 padding
── document 0: web, web.jsonl:7: 6 tokens, all of it
⟪<|begin_of_text|>x⟫ y↵
z<|end_of_text|>
── document 1: code, a.py:1: tokens 4 to 7 of 8
⟪<|begin_of_text|>def⟫ x<|end_of_text|>
── padding: 2 places

"""


def test_a_row_as_text() -> None:
    origins = [origin("web", "web.jsonl:7", 0, 6), origin("code", "a.py:1", 4, 8)]
    assert plain(row_text(view(["x y\nz", "def x"], 12, 1, origins), tokenizer())) == TEXT


TABLE = """\
step 3, row 0: 6 places, 1 document, 3 trained, 1 padding
  place  position    token    label  text
── document 0: 5 tokens
      0         0        0        -  '<|begin_of_text|>'
      1         1       89      {nl}  'x'
      2         2      {nl}       90  '\\n'
      3         3       90        1  'y'
      4         4        1        -  '<|end_of_text|>'
── padding: 1 place

"""


def test_a_row_as_a_table() -> None:
    (newline,) = tokenizer().encode("\n")
    shown = plain(row_table(view(["x\ny"], 6, 1), tokenizer()))
    assert shown == TABLE.format(nl=newline)


def test_a_label_beyond_the_row() -> None:
    ids = tokenizer().encode("def x y")
    found = next(views(batch((ids[:2], ids[1:3], [0, 0])), 1))
    assert plain(row_text(found, tokenizer())) == (
        "step 1, row 0: 2 places, 1 document, 2 trained, 0 padding\n── document 0: 2 tokens\n⟪def⟫ x→ y←\n\n"
    )


def test_no_document_speaks_to_the_terminal() -> None:
    assert harmless("a\x1b]0;x\x07\tb\n\x9b2J\u202ec\x7f\r") == "a\\x1b]0;x\\x07\tb\n\\x9b2J\\u202ec\\x7f\\x0d"
    evil = "\x1b[2J\u202e"
    shown = plain(row_text(view([evil], 24, origins=[origin("a", "\x1bfile", 0, 9)]), tokenizer()))
    assert not {"\x1b", "\u202e"} & {*shown}
    assert "\\x1b[2J\\u202e" in shown


def test_colours_and_no_markup_of_documents(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("FORCE_COLOR", "1"), ("TERM", "xterm-256color"), ("COLUMNS", "80")):
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("NO_COLOR", raising=False)
    found = view(["[red]x :smile:"], 12, 2)
    show(row_text(found, tokenizer()), colour=True)
    shown = capsys.readouterr().out
    assert "\x1b[35m<|begin_of_text|>\x1b[0m" in shown
    assert "⟪" not in shown
    assert "\x1b[1;35m<|end_of_text|>\x1b[0m" in shown
    show(row_text(found, tokenizer()), colour=False)
    assert "\x1b" not in (shown := capsys.readouterr().out)
    assert "[red⟫]x :smile:<|end_of_text|>\n" in shown


def survey(*found: RowView, **options: str) -> Survey:
    sums = Survey(**options)  # pyrefly: ignore[bad-argument-type]
    for each in found:
        sums.add(each)
    return sums


SUMS = """\
2 rows, 20 places
  tokens             16    80.0%
  padding             4    20.0%
  trained            12    60.0%
sources
  source  tokens  documents  trained  share of tokens  wanted  since the start
  code         4          0    75.0%            25.0%   20.0%              n/a
  rare         0          0      n/a             0.0%    5.0%                0
  web         12          3    75.0%            75.0%   75.0%            1,012
lengths in tokens of documents that begin in these rows
              2–3         1 ####################
              4–7         2 ########################################
"""


def test_sums() -> None:
    first = view(["x y", "x y z"], 10, origins=[origin("web", "w:1", 0, 4), origin("web", "w:2", 0, 5)])
    second = view(["x y", "z"], 10, origins=[origin("code", "c:1", 8, 12), origin("web", "w:3", 0, 3)])
    sums = survey(first, second)
    sums.before = {"web": 1000, "rare": 0}
    assert plain(survey_text(sums, {"web": 0.75, "code": 0.2, "rare": 0.05})) == SUMS
    assert sums.plain() == {
        "rows": 2,
        "places": 20,
        "padding": 4,
        "trained": 12,
        "documents": 4,
        "served": {"web": 1012, "rare": 0},
        "sources": {
            "code": {"tokens": 4, "documents": 0, "trained": 3},
            "web": {"tokens": 12, "documents": 3, "trained": 9},
        },
        "lengths_of": "documents",
        "lengths": [{"from": 2, "to": 3, "documents": 1}, {"from": 4, "to": 7, "documents": 2}],
    }


def test_shares_of_documents() -> None:
    found = view(["x", "y"], 6, origins=[origin("a", "a:1", 0, 3), origin("b", "b:1", 0, 3)])
    assert survey(found, unit="documents").source_rows({"a": 0.5, "b": 0.5})[:2] == [
        ("source", "tokens", "documents", "trained", "share of documents", "wanted", "since the start"),
        ("a", "3", "1", "66.7%", "50.0%", "50.0%", "n/a"),
    ]


def test_names_are_made_harmless() -> None:
    found = survey(view(["x"], 3, origins=[origin("a\x1b[2J", "a:1", 0, 3)]))
    assert found.source_rows({})[1][0] == "a\\x1b[2J"


def test_sums_without_origins() -> None:
    sums = survey(view(["x y", "z"], 10))
    assert (sums.sources, sums.whole, dict(sums.lengths)) == ({}, False, {4: 1, 3: 1})
    assert plain(survey_text(survey(), {})) == (
        "0 rows, 0 places\n  tokens              0      n/a\n  padding             0      n/a\n"
        "  trained             0      n/a\nlengths in tokens of documents that begin in these rows\n"
    )


class Reader(HTMLParser):
    """Collects a page's elements and its text."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.names: set[str] = set()
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.names.update(name for name, _ in attrs)

    def handle_data(self, data: str) -> None:
        self.text += data


def test_a_page_runs_nothing() -> None:
    evil = '</pre><script>alert("x")</script><img src=x onerror=alert(1)>'
    name = "<script>a</script>"
    found = view([evil], 80, origins=[origin(name, '"><b>', 0, 80)])
    text = page(name, [found], survey(found), {name: 1.0}, tokenizer())
    reader = Reader()
    reader.feed(text)
    allowed = {"html", "head", "meta", "title", "style", "body", "h1", "h2", "table", "tr", "td", "th", "div", "p"}
    assert reader.tags <= allowed | {"pre", "i"}
    assert reader.names <= {"lang", "charset", "http-equiv", "content", "class", "style", "title"}
    assert evil in reader.text
    assert f'content="{POLICY}"'.replace("'", "&#x27;") in text
    assert not [word for word in ("http://", "https://", "url(", "@import") if word in text]


def test_a_page_says_what_the_text_says() -> None:
    found = view(["x y\nz"], 8, 1)
    text = page("rows of tests", [found], survey(found), {}, tokenizer())
    assert '<i class="special masked" title="token 0, place 0, position 0, label none">' in text
    assert '<i title="token 1, place 5, position 5, label none"' not in text
    assert '<i class="special" title="token 1, place 5, position 5, label none">&lt;|end_of_text|&gt;</i>' in text
    assert "<h2>step 3, row 0: 8 places, 1 document, 4 trained, 2 padding</h2>" in text
    assert "<tr><td>4–7</td><td>1</td>" in text


def test_everything_in_order() -> None:
    found = view(["x y"], 6)
    legend = "a loss is taken at this text; ⟪at this none⟫; →only predicted←; ↵ ends a line\n"
    rows, sums = plain(row_text(found, tokenizer())), plain(survey_text(survey(found), {}))
    assert plain(everything("rows\x07", [found], survey(found), {}, tokenizer())) == (
        f"rows\\x07\n{legend}\n{rows}{sums}"
    )
    assert plain(everything("rows", [], survey(found), {}, tokenizer())) == f"rows\n\n{sums}"
