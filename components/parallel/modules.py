"""Modules by the names that a plan gives them."""

import re

from torch import nn


def find(model: nn.Module, patterns: tuple[str, ...]) -> dict[str, nn.Module]:
    """Modules whose name matches a pattern, in the model's order; `*` stands for one path element.

    A pattern may match nothing: a flavor or a pipeline stage need not have every module that its family's plan names.
    An `nn.Identity` stands for a module that another stage holds, and matches nothing.
    """
    matches = re.compile("|".join(re.escape(pattern).replace(r"\*", r"[^.]+") for pattern in patterns) or r"(?!)")
    return {
        name: module
        for name, module in model.named_modules()
        if matches.fullmatch(name) and not isinstance(module, nn.Identity)
    }
