"""Where chat templates run: Jinja's sandbox with the settings and functions that Hugging Face templates count on.

A template comes with a tokenizer, so from wherever that came from. The sandbox keeps it from Python's inner objects and
from changing what it is given; what it loops over, multiplies and prints is bounded, so that a mistake in one ends in a
message and not in swapping. A template that means harm can still waste time and memory: that would need a process of
its own, which was rejected, since the same template runs unbounded wherever the model is served.

`strftime_now` always says 26 July 2024 (the date that Llama 3.1's template falls back to where there is no clock): what
a record becomes must not depend on the day it is read.
"""

import json
import math
import re
from collections.abc import Mapping
from datetime import datetime
from typing import Any, NoReturn

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import CallBlock, Node
from jinja2.parser import Parser
from jinja2.runtime import Context, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError
from jinja2.utils import Namespace

TODAY = datetime(2024, 7, 26)
MAX_CHARACTERS = 1 << 24
"""Of one rendering, and of a product of strings."""
MAX_LOOPS = 1 << 20
"""Numbers that the ranges of one rendering may have together."""
BEGIN, END = "\U0010fff0", "\U0010fff1"
"""Stand around what a template marks as generated, until its places are noted."""
GENERATED = re.compile(f"[{BEGIN}{END}]")


class Generation(Extension):
    """The block `{% generation %} ... {% endgeneration %}`, which marks what the assistant says."""

    tags = {"generation"}  # noqa: RUF012  (the library's own attribute)

    def parse(self, parser: Parser) -> Node:
        """See jinja2.ext.Extension."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return CallBlock(self.call_method("_around"), [], [], body).set_lineno(line)

    def _around(self, caller: Macro) -> str:
        text = caller()
        return f"{BEGIN}{text}{END}" if getattr(self.environment, "marking", False) else text


class Sandbox(ImmutableSandboxedEnvironment):
    """The environment of one template; not for several threads at once."""

    intercepted_binops = frozenset(("*", "**"))

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
        self.marking = False
        """Put BEGIN and END around what is marked."""
        self._loops = 0
        self.filters["tojson"] = _tojson
        functions: dict[str, Any] = {
            "raise_exception": _refuse,
            "strftime_now": TODAY.strftime,
            "range": self._range,
            "namespace": Attributes,
        }
        self.globals.update(functions)

    def render(self, template: jinja2.Template, values: Mapping[str, Any], *, marking: bool = False) -> str:
        """Text of a template. Raises SecurityError where it does what is not allowed, or too much of it."""
        self.marking, self._loops = marking, 0
        pieces, size = [], 0
        for piece in template.generate(values):
            size += len(piece)
            if size > MAX_CHARACTERS:
                raise SecurityError(f"it prints more than {MAX_CHARACTERS} characters")
            pieces.append(piece)
        return "".join(pieces)

    def call(self, context: Context, obj: Any, *args: Any, **values: Any) -> Any:  # pyrefly: ignore [bad-override]
        """Calls, but not with numbers that ask for very long text. Raises SecurityError."""
        for value in (*args, *values.values()):
            if isinstance(value, int) and abs(value) > MAX_CHARACTERS:
                raise SecurityError(f"it calls something with {value}; at most {MAX_CHARACTERS} is allowed")
        return super().call(context, obj, *args, **values)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Products and powers, if they stay small. Raises SecurityError."""
        numbers = [x for x in (left, right) if isinstance(x, int | float)]
        sized = [x for x in (left, right) if isinstance(x, str | list | tuple)]
        if sized and numbers and len(sized[0]) * numbers[0] > MAX_CHARACTERS:
            raise SecurityError(f"it multiplies to more than {MAX_CHARACTERS} characters")
        if operator == "**" and len(numbers) == 2 and abs(right) * math.log2(abs(left) + 1) > 64:
            raise SecurityError("it takes a power of more than 64 bits")
        return super().call_binop(context, operator, left, right)

    def _range(self, *bounds: int) -> range:
        numbers = range(*bounds)
        self._loops += len(numbers)
        if self._loops > MAX_LOOPS:
            raise SecurityError(f"its ranges have more than {MAX_LOOPS} numbers")
        return numbers


class Attributes(Namespace):
    """Jinja's `namespace`, without names that begin with an underscore: Python's inner objects have such."""

    def __init__(*args: Any, **values: Any) -> None:
        for name in dict(*args[1:], **values):
            _public(name)
        Namespace.__init__(*args, **values)

    def __setitem__(self, name: str, value: Any) -> None:
        _public(name)
        super().__setitem__(name, value)


def _public(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"it sets {name!r} in a namespace; names must not begin with an underscore")


def _refuse(message: object) -> NoReturn:
    raise jinja2.TemplateError(str(message))


def _tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as it is written elsewhere. Jinja's own filter escapes it for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
