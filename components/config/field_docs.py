"""The docstrings under the fields of a dataclass: one text for the reader of the code, of the docs and of `--help`.

Read from the source, since Python drops them. Rejected: `Annotated[int, Doc(...)]`, which says the same in more noise.
"""

import ast
import inspect
import re
import sys
from functools import cache
from typing import Any


@cache
def field_docs(table: Any) -> dict[str, str]:
    """Field → its docstring on one line, for the fields that a dataclass and its bases have docstrings under."""
    docs: dict[str, str] = {}
    for base in reversed(table.__mro__):
        docs.update(_module_docs(base.__module__).get(base.__qualname__, {}))
    return docs


def section_doc(table: Any) -> str:
    """The docstring of the dataclass, on one line, without the section's own name in front."""
    text = re.sub(r"^`\[[\w.]+\]`[:.] ?", "", " ".join((inspect.getdoc(table) or "").split()))
    return text[:1].upper() + text[1:]


@cache
def _module_docs(module: str) -> dict[str, dict[str, str]]:
    """Class → field → docstring, of the top-level classes of a module; nothing where there is no source."""
    try:
        tree = ast.parse(inspect.getsource(sys.modules[module]))
    except (OSError, TypeError):  # built in, or made at run time
        return {}
    return {node.name: _class_docs(node) for node in tree.body if isinstance(node, ast.ClassDef)}


def _class_docs(node: ast.ClassDef) -> dict[str, str]:
    docs: dict[str, str] = {}
    for statement, following in zip(node.body, node.body[1:], strict=False):
        match statement, following:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                docs[name] = " ".join(text.split())
    return docs
