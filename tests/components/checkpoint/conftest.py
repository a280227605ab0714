"""Shared by the tests of checkpoints."""

import logging
from collections.abc import Iterator

import pytest

from components.runtime.logging import logger


@pytest.fixture
def told() -> Iterator[list[str]]:
    """What is logged."""

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    lines: list[str] = []
    handler, level = Handler(), logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield lines
    logger.removeHandler(handler)
    logger.setLevel(level)
