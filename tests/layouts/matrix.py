"""The matrix: every layout that is checked, a line each. To add a layout, add a line.

`fast` rows run with every test run, `slow` ones in the slow set, `refused` ones cannot be, with the text that says so.
Axes and modifiers are explained in `layout.py`; `docs/layouts.md` is generated from this table.
"""

from tests.layouts.layout import Layout


def fast(model: str, axes: str, modifiers: str = "") -> Layout:
    return Layout(model, axes, modifiers)


def slow(model: str, axes: str, modifiers: str = "") -> Layout:
    return Layout(model, axes, modifiers, slow=True)


def refused(model: str, axes: str, modifiers: str, text: str) -> Layout:
    return Layout(model, axes, modifiers, refused=text)


DATA = (
    fast("llama/untied", ""),
    fast("llama/untied", "", "accumulate by-op chunked foreach"),
    fast("llama/untied", "", "bf16"),
    fast("llama/untied", "", "causal recompute"),
    fast("llama/untied", "fsdp=2"),
    fast("llama/untied", "fsdp=2", "accumulate never chunked"),
    fast("llama/untied", "fsdp=2", "offload always selective"),
    fast("llama/untied", "fsdp=2", "bf16 accumulate"),
    fast("llama/untied", "fsdp=2", "compile by-op causal"),
    fast("llama/tied", "fsdp=4", "recompute workers"),
    fast("llama/untied", "ddp=2", "accumulate recompute always"),
    fast("llama/untied", "ddp=2", "never chunked causal bf16"),
    fast("llama/untied", "ddp=2", "compile selective"),
    fast("llama/tied", "ddp=4", "by-op"),
    fast("llama/tied", "ddp=2 fsdp=2", "accumulate"),
    fast("llama/untied", "ddp=2 fsdp=2", "offload always"),
    slow("llama/tied", "fsdp=8 local=1"),
    slow("llama/tied", "ddp=2 fsdp=4 local=1", "recompute chunked never"),
    slow("llama/tied", "ddp=4 fsdp=2 local=1", "bf16"),
    slow("llama/tied", "fsdp=2", "compile accumulate chunked"),
    fast("llama/untied", "fsdp=2", "inductor"),
    refused(
        "llama/untied",
        "ddp=2",
        "offload",
        "--training.enable_cpu_offload: needs sharded parameters, but they are shared by 1 rank; start more ranks with"
        " parallelism.data_parallel_shard_degree = -1, or set it to false",
    ),
)
"""Data parallelism: replicated (ddp), sharded (fsdp), both."""

MATRIX: tuple[Layout, ...] = (*DATA,)
