"""What a value may be, how it is written on the command line, and how messages call it."""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import pytest
from pydantic import Field

from components.config.annotations import describe, toml_literal
from components.config.optim import ParameterGroup
from components.config.types import (
    AllOrPositive,
    Fraction,
    NonEmpty,
    NonNegative,
    OpenFraction,
    Positive,
    PositiveInt,
    PositiveOrInf,
    Seconds,
    Seed,
)
from components.config.values import Fault, check, parse_text


@pytest.mark.parametrize(
    ("annotation", "words"),
    [
        (bool, "true or false"),
        (int, "an integer"),
        (PositiveInt, "an integer of at least 1"),
        (PositiveInt | None, "an integer of at least 1 or none"),
        (AllOrPositive, "-1 or an integer of at least 1"),
        (Positive, "a finite number greater than 0"),
        (PositiveOrInf, "a number greater than 0"),
        (Seed | None, "an integer from 0 to 9223372036854775807 or none"),
        (Seconds, "an integer from 1 to 31536000"),
        (NonEmpty, "a string of at least 1 character"),
        (Fraction, "a number from 0 to 1"),
        (OpenFraction, "a number of at least 0 and less than 1"),
        (Literal["a", "b"], 'one of "a", "b"'),
        (Literal["a", "b"] | None, 'one of "a", "b" or none'),
        (Literal["a"], '"a"'),
        (list[str], "a list of strings"),
        (list[str] | str, "a list of strings or a string"),
        (list[list[str]], "a list of lists of strings"),
        (list[Literal["model", "loss"]], 'a list of values out of "model", "loss"'),
        (list[ParameterGroup], "a list of tables with pattern, lr_factor, weight_decay"),
        (list[PositiveInt], "a list of values that are each an integer of at least 1"),
    ],
)
def test_describe(annotation: Any, words: str) -> None:
    assert describe(annotation) == words


@pytest.mark.parametrize(
    ("annotation", "value", "wanted"),
    [
        (float, 3, 3.0),
        (PositiveOrInf, float("inf"), float("inf")),
        (Seed | None, 2**63 - 1, 2**63 - 1),
        (int | None, "none", None),
        (tuple[float, float], [0.9, 1], (0.9, 1.0)),
        (AllOrPositive, -1, -1),
        (list[ParameterGroup], [{"pattern": "x"}], [ParameterGroup("x")]),
        (list[str] | str, "x", "x"),
    ],
)
def test_accepted(annotation: Any, value: object, wanted: object) -> None:
    faults: list[Fault] = []
    result = check(annotation, value, ("k",), faults)
    assert (result, type(result), faults) == (wanted, type(wanted), [])


@pytest.mark.parametrize(
    ("annotation", "value"),
    [
        (int, "1"),
        (int, True),
        (int, 1.0),
        (float, "1.0"),
        (float, True),
        (bool, 1),
        (bool, "true"),
        (str, 1),
        (list[str], "a"),
        (list[str], [1]),
        (AllOrPositive, 0),
        (AllOrPositive, -2),
        (Positive, 0),
        (Positive, float("nan")),
        (Positive, float("inf")),
        (NonNegative, float("inf")),
        (PositiveOrInf, float("nan")),
        (Seed, -1),
        (Seed, 2**63),
        (Seconds, 365 * 24 * 3600 + 1),
        (NonEmpty, ""),
        (OpenFraction, 1),
        (Literal["a"], "b"),
        (str, {"a": 1}),
    ],
)
def test_refused(annotation: Any, value: object) -> None:
    faults: list[Fault] = []
    check(annotation, value, ("k",), faults)
    assert faults == [Fault(("k",), f"must be {describe(annotation)}", toml_literal(value))]


def test_faults_inside_tables() -> None:
    faults: list[Fault] = []
    check(list[ParameterGroup], [{"pattern": "x"}, {"patern": "y", "lr_factor": -1.0}], ("g",), faults)
    assert faults == [
        Fault(("g", 1, "patern"), "unknown key; did you mean pattern?"),
        Fault(("g", 1, "lr_factor"), "must be a finite number of at least 0", "-1.0"),
        Fault(("g", 1), "key 'pattern' is missing: must be a string"),
    ]


@pytest.mark.parametrize(
    ("annotation", "text", "wanted"),
    [
        (int, "12", 12),
        (PositiveInt, "1_000", 1000),
        (int, "1.5", "1.5"),
        (float, "1e-3", 0.001),
        (PositiveOrInf, "inf", float("inf")),
        (bool, "True", True),
        (bool, "yes", "yes"),
        (str, "12", "12"),
        (AllOrPositive, "-1", -1),
        (AllOrPositive, "8", 8),
        (list[str], "a, b,c", ["a", "b", "c"]),
        (list[str], "", []),
        (list[str], '["a,b", "c"]', ["a,b", "c"]),
        (list[str], "['a']", ["a"]),
        (list[int], "1,2", [1, 2]),
        (list[str] | str, "a", ["a"]),
        (list[list[str]], '[["a"], ["b", "c"]]', [["a"], ["b", "c"]]),
        (list[list[str]] | None, "none", "none"),  # `check` makes None of it
        (list[ParameterGroup], '[{"pattern": "x"}]', [{"pattern": "x"}]),  # JSON
        (list[ParameterGroup], "[{pattern = 'x'}]", [{"pattern": "x"}]),  # TOML
        (tuple[float, float], "0.9,0.95", [0.9, 0.95]),
        (Literal["1", "op"], "1", "1"),
        (Annotated[int, Field(ge=5)], "3", 3),
    ],
)
def test_parse_text(annotation: Any, text: str, wanted: object) -> None:
    result = parse_text(annotation, text)
    assert (result, type(result)) == (wanted, type(wanted))


@dataclass(frozen=True)
class Point:
    x: int = 0
    y: int | None = None


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "none"),
        (True, "true"),
        (1e-8, "1e-08"),
        ('a"\\\n', '"a\\"\\\\\\n"'),
        ([1, ["a"]], '[1, ["a"]]'),
        ({"a": 1, "b c": [2]}, '{ a = 1, "b c" = [2] }'),
        (Point(1), "{ x = 1 }"),
    ],
)
def test_toml_literal(value: object, text: str) -> None:
    assert toml_literal(value) == text
