from collections.abc import Iterator

import pytest

from components.runtime.errors import ConfigError
from components.runtime.logging import configure, logger, prints_messages
from components.runtime.world import World


@pytest.fixture(autouse=True)
def _restore() -> Iterator[None]:
    state = logger.level, logger.propagate, list(logger.handlers)
    yield
    logger.setLevel(state[0])
    logger.propagate, logger.handlers[:] = state[1], state[2]


def test_logged_rank_prints_plain_lines_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    configure(World(0, 0, 2), "0")
    logger.info("device: %s", "cpu")
    logger.warning("slow")
    assert capsys.readouterr() == ("", "device: cpu\n[rank 0] warning: slow\n")
    assert prints_messages()


def test_other_ranks_print_only_warnings(capsys: pytest.CaptureFixture[str]) -> None:
    configure(World(1, 1, 2), "0")
    logger.info("device: cpu")
    logger.warning("slow")
    assert capsys.readouterr() == ("", "[rank 1] warning: slow\n")
    assert not prints_messages()


def test_several_logged_ranks_are_told_apart(capsys: pytest.CaptureFixture[str]) -> None:
    configure(World(8, 0, 16), "0, 8")
    logger.info("here")
    assert capsys.readouterr().err == "[rank 8] here\n"


def test_configuring_twice_prints_once(capsys: pytest.CaptureFixture[str]) -> None:
    configure(World(0, 0, 1), "0")
    configure(World(0, 0, 1), "0")
    logger.info("once")
    assert capsys.readouterr().err == "once\n"


def test_not_ranks() -> None:
    with pytest.raises(ConfigError) as caught:
        configure(World(0, 0, 1), "all")
    assert str(caught.value) == ("environment: LOG_RANK = 'all': allowed: ranks separated by commas, such as 0 or 0,8")
