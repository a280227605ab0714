"""The scanner must find every key that tomli finds, and no other, on the line where it stands."""

import tomli
import tomli_w
from hypothesis import given, settings
from hypothesis import strategies as st

from components.config.toml_lines import Path, key_lines

NASTY = '''\
# [not.a.table]
top = "a # no comment [x]"  # a comment = 1
"quoted key" = 'literal "x" # y'
"esc\\"aped.dot" . inner = 1
a.b . c = 1_000
long = """
[fake]
fake = 1
quotes: "" and \\""" and four: """"
literal = \'\'\'
[fake2]
ends with two quotes\'\'\'\'\'
empty = """"""
date = 1979-05-27 07:32:00Z
numbers = [
    1,  # one = 1
    [2, 3], # ]
    "]",
]
inline = { x = 1, y.z = [ { w = "}" }, {} ], "q r" = \'=\' }

[section]   # trailing
key = -inf
[section.sub]
key=1
[ other . "dotted.name" ]
key = true

[[many]]
name = "first"
  [many.sub]
  deep = 1
  [[many.sub.list]]
  v = 1
  [[many.sub.list]]
  v = 2
[[many]]
name = "second"
sub.deep = 2
[late]
x = 0x1F'''


def paths(value: object, prefix: Path = ()) -> set[Path]:
    """Every path of a parsed document."""
    items = (
        list(value.items()) if isinstance(value, dict) else list(enumerate(value)) if isinstance(value, list) else []
    )
    found = {prefix} if prefix else set()
    for name, part in items:
        found |= paths(part, (*prefix, name))
    return found


def test_nasty_paths() -> None:
    assert set(key_lines(NASTY)) == paths(tomli.loads(NASTY))


def test_nasty_lines() -> None:
    lines = key_lines(NASTY)
    assert lines["top",] == 2
    assert lines["quoted key",] == 3
    assert lines['esc"aped.dot', "inner"] == 4
    assert lines["a", "b", "c"] == lines["a",] == 5
    assert lines["long",] == 6
    assert lines["literal",] == 10
    assert lines["empty",] == 13
    assert lines["numbers",] == 15
    assert lines["numbers", 1, 1] == 17
    assert lines["inline", "y", "z", 0, "w"] == 20
    assert lines["section",] == 22
    assert lines["section", "sub", "key"] == 25
    assert lines["other", "dotted.name", "key"] == 27
    assert lines["many", 0, "sub", "list", 1, "v"] == 36
    assert lines["many", 1] == 37
    assert lines["many", 1, "sub", "deep"] == 39
    assert lines["late", "x"] == 41


def test_windows_line_ends() -> None:
    assert key_lines("a = 1\r\n[b]\r\nc = '''\r\n'''\r\nd = 2\r\n") == {
        ("a",): 1,
        ("b",): 2,
        ("b", "c"): 3,
        ("b", "d"): 5,
    }


def test_empty() -> None:
    assert key_lines("") == {}
    assert key_lines("# nothing\n\n") == {}


TEXT = st.text(st.characters(codec="utf-8", exclude_categories=("Cs",)), max_size=8)
LEAVES = st.one_of(st.integers(-(2**60), 2**60), st.booleans(), st.floats(), TEXT, st.dates(), st.datetimes())
VALUES = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3), max_leaves=12
)


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(TEXT, VALUES, max_size=4), st.booleans())
def test_agrees_with_tomli(document: dict[str, object], multiline: bool) -> None:
    text = tomli_w.dumps(document, multiline_strings=multiline)
    assert set(key_lines(text)) == paths(tomli.loads(text))
