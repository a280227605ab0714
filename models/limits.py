"""What a model of some shape cannot do in a layout, as lines for `check`; shared by the families' `ModelArgs.problems`.
Torch-free.
"""

from collections.abc import Iterator

from components.config.job_config import JobConfig


def tensor_problems(job: JobConfig, n_heads: int, n_kv_heads: int) -> Iterator[str]:
    """Heads that tensor parallelism cannot deal out. All other sizes may be uneven."""
    degree = job.parallelism.tensor_parallel_degree
    fitting = [d for d in range(1, n_heads + 1) if n_heads % d == 0 and not (n_kv_heads % d and d % n_kv_heads)]
    line = f"parallelism.tensor_parallel_degree = {degree}: each rank computes"
    if n_heads % degree:
        yield f"{line} whole heads, but {degree} does not divide the {n_heads} heads; take {_choice(fitting)}"
    elif n_kv_heads % degree and degree % n_kv_heads:
        yield (
            f"{line} the key-value heads of its heads, but {degree} neither divides their number, {n_kv_heads}, nor is"
            f" a multiple of it; take {_choice(fitting)}"
        )


def context_problems(job: JobConfig, n_heads: int) -> Iterator[str]:
    """Heads that `ulysses` cannot trade for tokens. The other methods take any number."""
    config = job.parallelism
    degree, heads = config.context_parallel_degree, n_heads // config.tensor_parallel_degree
    if config.context_parallel_rotate_method != "ulysses" or degree == 1 or heads % degree == 0:
        return
    fitting = [d for d in range(1, heads + 1) if heads % d == 0]
    yield (
        f"parallelism.context_parallel_degree = {degree}: ulysses deals the {heads} heads of each rank"
        f" ({n_heads} / tensor_parallel_degree) evenly to {degree} ranks; take {_choice(fitting or [1])}, or another"
        " parallelism.context_parallel_rotate_method"
    )


def _choice(numbers: list[int]) -> str:
    *most, last = map(str, numbers)
    return f"{', '.join(most)} or {last}" if most else last
