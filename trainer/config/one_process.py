"""What `comm.mode = "local_tensor"`, all ranks in one process, cannot do: as lines for `check`. Torch-free.

It is torch's LocalTensor that cannot: one program runs for all ranks, on tensors that hold the pieces of all.
"""

from collections.abc import Iterator

from components.config.job_config import JobConfig
from components.mesh.degrees import Degrees

MODE = 'with comm.mode = "local_tensor"'


def one_process_problems(job: JobConfig, degrees: Degrees) -> Iterator[str]:
    """Layouts and settings that need ranks of their own."""
    if job.comm.mode != "local_tensor":
        return
    yield from _layouts(degrees)
    if job.compile.enable:
        yield f"compile.enable = true: {MODE} torch cannot trace attention with a mask; set it to false"
    if job.checkpoint.enable:
        yield f"checkpoint.enable = true: {MODE} there is no rank whose pieces could be saved; set it to false"
    if job.debug.compare_ranks:
        yield f"debug.compare_ranks = {job.debug.compare_ranks}: {MODE} look at the tensors themselves; set it to 0"
    if job.training.enable_cpu_offload:
        yield f"training.enable_cpu_offload = true: {MODE} there is no FSDP2, which offloads; set it to false"
    if job.training.mixed_precision_param not in ("auto", job.training.dtype):
        yield (
            f'training.mixed_precision_param = "{job.training.mixed_precision_param}": {MODE} there is no FSDP2, which'
            ' casts; set it to "auto"'
        )


def _layouts(degrees: Degrees) -> Iterator[str]:
    share = degrees.cp * degrees.tp
    if degrees.batch > 1:
        kind, degree = ("shard", degrees.dp_shard) if degrees.dp_shard > 1 else ("replicate", degrees.dp_replicate)
        yield (
            f"parallelism.data_parallel_{kind}_degree = {degree}: {MODE} there is no data parallelism: FSDP2 resizes"
            f" storages, which torch's LocalTensor does not have; start {share} in all: context × tensor"
        )
    if degrees.pp > 1:
        yield (
            f"parallelism.pipeline_parallel_degree = {degrees.pp}: {MODE} all ranks run one program, but stages run"
            " different ones; set it to 1"
        )
    if degrees.ep > 1:
        yield (
            f"parallelism.expert_parallel_degree = {degrees.ep}: {MODE} ranks cannot send different numbers of tokens;"
            " set it to 1"
        )
