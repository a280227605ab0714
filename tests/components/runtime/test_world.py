import pytest

from components.runtime.errors import ConfigError
from components.runtime.world import World


def test_one_process_needs_no_variables() -> None:
    assert World.from_environ({}) == World(rank=0, local_rank=0, size=1)


def test_torchrun_variables() -> None:
    assert World.from_environ({"RANK": "9", "LOCAL_RANK": "1", "WORLD_SIZE": "16"}) == World(9, 1, 16)


@pytest.mark.parametrize(
    ("environ", "problem"),
    [
        ({"RANK": "x"}, "environment: RANK = 'x': allowed: a whole number from 0 on"),
        ({"RANK": "-1"}, "environment: RANK = '-1': allowed: a whole number from 0 on"),
        ({"WORLD_SIZE": "0"}, "environment: WORLD_SIZE = '0': allowed: a whole number from 1 on"),
        ({"RANK": "4", "WORLD_SIZE": "4"}, "environment: RANK = 4 with WORLD_SIZE = 4: allowed: 0 to 3"),
        ({"LOCAL_RANK": "1", "WORLD_SIZE": "2"}, "environment: LOCAL_RANK = 1 with RANK = 0: allowed: 0 to 0"),
    ],
)
def test_malformed(environ: dict[str, str], problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        World.from_environ(environ)
    assert str(caught.value) == f"{problem}; torchrun sets these variables, or unset all of them"


def test_all_problems_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        World.from_environ({"RANK": "a", "LOCAL_RANK": "b", "WORLD_SIZE": "c"})
    assert len(caught.value.problems) == 3
