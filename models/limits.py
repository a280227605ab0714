"""What a model of some shape cannot do in a layout, as lines for `check`; shared by the families' `ModelArgs.problems`.
Torch-free.
"""

from collections.abc import Iterator

from components.config.job_config import JobConfig


def head_problems(head_dim: int) -> Iterator[str]:
    """A width of heads that rotary positions cannot pair."""
    if head_dim % 2:
        yield f"model.flavor: heads are {head_dim} wide, but rotary positions turn pairs: the width must be even"


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


def one_process_problems(job: JobConfig, **sizes: int) -> Iterator[str]:
    """Sizes, by what they are called, that must divide evenly where one process runs all ranks."""
    degree = job.parallelism.tensor_parallel_degree
    if job.comm.mode != "local_tensor":
        return
    for name, size in sizes.items():
        if size % degree:
            yield (
                f'parallelism.tensor_parallel_degree = {degree}: with comm.mode = "local_tensor" all ranks\' pieces are'
                f" as long, but {degree} does not divide {size} ({name}); take a degree that does"
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


def expert_problems(job: JobConfig, count: int = 0, hidden: int = 0, biases: int = 0) -> Iterator[str]:
    """Experts (`count`, each `hidden` wide, with output biases of `biases` elements) that cannot be dealt out evenly,
    or none at all."""
    expert, tensor = job.parallelism.expert_parallel_degree, job.parallelism.expert_tensor_parallel_degree
    for kind, degree, size, what in (
        ("expert", expert, count, "experts"),
        ("expert_tensor", tensor, hidden, "columns"),
        *([("expert_tensor", tensor, biases, "bias elements")] if biases else []),
    ):
        key = f"parallelism.{kind}_parallel_degree = {degree}"
        if degree > 1 and not count:
            yield f"{key}: this model has no experts; set it to 1"
        elif size % degree:
            of = "" if kind == "expert" else " of each expert"
            yield f"{key}: {size} {what}{of} cannot be dealt evenly to {degree} ranks; take a divisor of {size}"


def length_problems(job: JobConfig, longest: int) -> Iterator[str]:
    """Rows longer than what the flavor was made for."""
    lengths = {"training.seq_len": job.training.seq_len}
    if job.validation.enable:
        lengths["validation.seq_len"] = job.validation.seq_len
    for key, length in lengths.items():
        if length > longest:
            yield f"{key} = {length}: longer than the {longest} tokens this flavor was made for; shorten it"


def _choice(numbers: list[int]) -> str:
    *most, last = map(str, numbers)
    return f"{', '.join(most)} or {last}" if most else last
