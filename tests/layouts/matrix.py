"""The matrix: every layout that is checked, a line each. To add a layout, add a line.

`fast` rows run with every test run, `slow` ones in the slow set, `refused` ones cannot be, with the text that says so.
Axes and modifiers are explained in `layout.py`; `docs/layouts.md` is generated from this table. Together the fast rows
hold every axis, every pair of axes, and every modifier with every axis (`test_layouts.py` sees to it).
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
    fast("llama/untied", "fsdp=2", "compile by-op"),
    fast("llama/untied", "fsdp=2", "inductor"),
    fast("llama/untied", "fsdp=4", "recompute workers"),
    fast("llama/tied", "ddp=2"),
    fast("llama/tied", "ddp=4", "by-op"),
    fast("llama/tied", "ddp=2 fsdp=2", "accumulate recompute always"),
    slow("llama/untied", "ddp=2 fsdp=2", "offload always"),
    slow("llama/untied", "ddp=2", "compile selective"),
    slow("llama/tied", "fsdp=2", "compile accumulate chunked causal"),
    fast("llama/untied", "ddp=2", "offload"),
    slow("llama/untied", "", "offload"),
    slow("llama/tied", "fsdp=8"),
    slow("llama/tied", "ddp=2 fsdp=4", "recompute chunked never"),
    slow("llama/tied", "ddp=4 fsdp=2", "bf16"),
    refused(
        "llama/untied",
        "ddp=2",
        "early",
        "--optimizer.early_step_in_backward: weights move before the norm of all gradients is known, so that nothing"
        " can be clipped to training.max_norm = 0.1; set that to inf, or this to false",
    ),
)
"""Data parallelism: replicated (ddp), sharded (fsdp), both."""

TENSOR = (
    fast("llama/tied", "tp=2"),
    fast("llama/untied", "tp=2", "by-op bf16"),
    fast("llama/untied", "tp=2", "gathered-logits"),
    fast("llama/untied", "tp=2", "compile"),
    fast("llama/untied", "tp=4"),  # more ranks than key-value heads
    fast("llama/odd", "tp=3"),  # three heads, one of keys; everything else divides badly
    fast("llama/untied", "ddp=2 tp=2", "selective chunked never"),
    fast("llama/tied", "fsdp=2 tp=2", "causal"),
    slow("llama/untied", "fsdp=2 tp=2", "gathered-logits chunked offload"),
    slow("llama/tied", "fsdp=2 tp=2", "accumulate always by-op"),
    slow("llama/untied", "fsdp=2 tp=2", "compile accumulate"),
    slow("llama/untied", "tp=2", "inductor"),
    slow("llama/untied", "tp=2", "offload"),
    slow("llama/untied", "tp=2", "compile by-op bf16"),
    slow("llama/untied", "fsdp=2 tp=4", "recompute"),
    slow("llama/tied", "ddp=2 tp=4", "bf16"),
    refused(
        "llama/untied",
        "tp=2",
        "async",
        "--parallelism.enable_async_tensor_parallel: it is inductor that overlaps, but it does not compile the model;"
        ' set compile.enable to true, with "model" in compile.components and compile.backend = "inductor", or this to'
        " false",
    ),
    refused(
        "llama/untied",
        "tp=3",
        "",
        "--parallelism.tensor_parallel_degree=3: each rank computes whole heads, but 3 does not divide the 4 heads;"
        " take 1, 2 or 4",
    ),
)
"""Tensor and sequence parallelism."""

CONTEXT = (
    fast("llama/untied", "cp=2"),
    fast("llama/untied", "cp=2 balance=none"),
    fast("llama/untied", "cp=2 rotate=alltoall"),
    fast("llama/untied", "cp=2 rotate=alltoall balance=none"),
    fast("llama/untied", "cp=2 rotate=ulysses"),
    fast("llama/untied", "cp=2 rotate=ulysses balance=none"),
    fast("llama/untied", "cp=2", "causal"),
    fast("llama/untied", "cp=2 balance=none", "causal"),
    fast("llama/untied", "cp=2 rotate=alltoall", "causal"),
    fast("llama/untied", "cp=2 rotate=alltoall balance=none", "causal"),
    fast("llama/untied", "cp=2 rotate=ulysses", "causal"),
    fast("llama/untied", "cp=2 rotate=ulysses balance=none", "causal"),
    fast("llama/untied", "ddp=2 cp=2 rotate=alltoall", "by-op bf16"),
    fast("llama/untied", "ddp=2 cp=2"),
    fast("llama/tied", "fsdp=2 cp=2", "selective chunked never"),
    fast("llama/untied", "tp=2 cp=2 rotate=ulysses", "accumulate recompute always"),
    slow("llama/untied", "cp=4"),
    slow("llama/untied", "cp=4 rotate=alltoall", "causal"),
    slow("llama/untied", "cp=4 rotate=alltoall"),
    slow("llama/untied", "cp=4 rotate=ulysses"),
    slow("llama/untied", "cp=2", "compile"),
    slow("llama/untied", "cp=2 rotate=alltoall", "compile causal"),
    slow("llama/untied", "cp=2 rotate=alltoall balance=none", "compile recompute causal"),
    slow("llama/untied", "cp=2 rotate=ulysses", "compile recompute"),
    slow("llama/untied", "fsdp=2 cp=2 rotate=ulysses", "offload gathered-logits"),
    slow("llama/untied", "fsdp=2 cp=4 rotate=alltoall", "recompute"),
    slow("llama/untied", "tp=4 cp=2 rotate=alltoall"),
    refused(
        "llama/untied",
        "tp=2 cp=4 rotate=ulysses",
        "",
        "--parallelism.context_parallel_degree=4: ulysses deals the 2 heads of each rank (4 / tensor_parallel_degree)"
        " evenly to 4 ranks; take 1 or 2, or another parallelism.context_parallel_rotate_method",
    ),
)
"""Context parallelism: three ways to move keys and values, with and without load balance."""

PIPELINE = (
    fast("llama/untied", "pp=2"),
    fast("llama/tied", "pp=2"),
    fast("llama/tied", "pp=2 schedule=GPipe"),
    fast("llama/tied", "pp=2 schedule=Interleaved1F1B"),
    fast("llama/tied", "pp=2 schedule=LoopedBFS"),
    fast("llama/tied", "pp=2 schedule=InterleavedZeroBubble"),
    fast("llama/tied", "pp=2 schedule=ZBVZeroBubble"),
    fast("llama/tied", "pp=2 schedule=DualPipeV"),
    fast("llama/tied", "pp=2 csv=tests/layouts/schedule.csv"),
    fast("llama/tied", "pp=4"),  # the two in the middle have neither tokens nor loss
    fast("llama/tied", "ddp=2 pp=2", "causal"),
    fast("llama/tied", "fsdp=2 pp=2", "by-op bf16"),
    fast("llama/tied", "fsdp=2 pp=2"),
    fast("llama/tied", "tp=2 pp=2", "accumulate recompute always"),
    fast("llama/tied", "cp=2 pp=2", "selective chunked never"),
    slow("llama/untied", "pp=2 micro=2"),
    slow("llama/tied", "pp=2 layers=1 schedule=Interleaved1F1B", "accumulate by-op"),
    slow("llama/tied", "pp=2 first_less=0 last_less=2"),
    slow("llama/tied", 'pp=2 parts=[["tok_embeddings","layers.0"],["layers.1","layers.2","layers.3","norm","output"]]'),
    slow("llama/tied", "fsdp=2 pp=2 schedule=ZBVZeroBubble", "always offload"),
    slow("llama/tied", "fsdp=2 pp=2 schedule=DualPipeV", "recompute chunked"),
    slow("llama/tied", "fsdp=2 pp=2 schedule=Interleaved1F1B", "bf16"),
    slow("llama/tied", "ddp=2 pp=2 schedule=InterleavedZeroBubble", "accumulate"),
    slow("llama/tied", "pp=2", "compile"),
    slow("llama/tied", "pp=2", "offload"),
    slow("llama/deep", "pp=4 schedule=Interleaved1F1B"),
    slow("llama/deep", "pp=4 schedule=LoopedBFS", "causal"),
    slow("llama/deep", "pp=4 schedule=ZBVZeroBubble"),
    refused(
        "llama/tied",
        "pp=4 schedule=Interleaved1F1B",
        "",
        "--parallelism.pipeline_parallel_degree=4: 4 layers are too few for 8 stages: with"
        " parallelism.pipeline_parallel_first_stage_less_layers = 1 and"
        " parallelism.pipeline_parallel_last_stage_less_layers = 1 a stage has room for (4 + 1 + 1) // 8 = 0, but needs"
        " 1; take fewer ranks or stages, or lower the two",
    ),
)
"""Pipeline parallelism: every schedule, and cuts."""

EXPERT = (
    fast("qwen/moe", ""),
    fast("qwen/moe", "", "accumulate recompute"),
    fast("qwen/moe", "fsdp=2"),
    fast("qwen/moe", "tp=2"),
    fast("qwen/moe", "cp=2"),
    fast("qwen/moe", "pp=2", "accumulate"),
    fast("qwen/moe", "fsdp=2 ep=2", "accumulate recompute always"),
    fast("qwen/moe", "tp=2 ep=2", "selective chunked never"),
    fast("qwen/moe", "tp=2 etp=2"),
    fast("qwen/moe", "cp=2 ep=2", "by-op bf16 forced"),
    fast("qwen/moe", "fsdp=2 pp=2 ep=2", "causal forced"),
    fast("qwen/moe", "ddp=2 fsdp=2 ep=2"),
    fast("qwen/moe", "fsdp=2 tp=2 ep=2 etp=2"),
    fast("qwen/moe", "tp=2 cp=2 ep=4", "recompute"),
    fast("qwen/moe", "tp=2 pp=2 ep=2"),
    slow("qwen/moe", "fsdp=4 ep=2", "offload"),
    slow("qwen/moe", "fsdp=4 ep=4", "by-op"),
    slow("qwen/moe", "fsdp=2 tp=2 ep=4", "accumulate"),
    slow("qwen/moe", "tp=2 cp=2 ep=2 etp=2", "by-op"),
    slow("qwen/moe", "cp=2 pp=2 ep=2"),
    slow("qwen/deep", "pp=2 schedule=Interleaved1F1B"),
    slow("qwen/deep", "fsdp=2 pp=2 schedule=ZBVZeroBubble ep=2"),
    slow("qwen/deep", "fsdp=2 pp=2 schedule=DualPipeV ep=2", "recompute"),
    slow("qwen/moe", "fsdp=2 ep=2", "compile"),
    slow("qwen/moe", "tp=2 ep=2", "compile accumulate"),
    refused(
        "llama/untied",
        "fsdp=2 ep=2",
        "",
        "--parallelism.expert_parallel_degree=2: this model has no experts; set it to 1",
    ),
    refused(
        "qwen/moe",
        "fsdp=2 tp=4 etp=2",
        "",
        "--parallelism.expert_tensor_parallel_degree=2: is neither 1 nor the tensor-parallel degree 4: set it to 1 or"
        " 4",
    ),
)
"""Expert parallelism, which deals ranks anew and adds none."""

MANY = (
    fast("llama/tied", "fsdp=2 tp=2 pp=2", "selective"),
    fast("llama/untied", "fsdp=2 tp=2 cp=2"),
    slow("llama/tied", "tp=2 cp=2 pp=2", "accumulate"),
    slow("llama/tied", "fsdp=2 cp=2 pp=2 rotate=alltoall", "by-op"),
    slow("llama/tied", "ddp=2 fsdp=2 tp=2", "recompute"),
    slow("llama/tied", "ddp=2 fsdp=2 cp=2 rotate=ulysses", "accumulate"),
    slow("llama/tied", "ddp=2 fsdp=2 pp=2", "bf16"),
    slow("llama/tied", "ddp=2 tp=2 cp=2", "chunked"),
    slow("llama/tied", "ddp=2 tp=2 pp=2 schedule=ZBVZeroBubble"),
    slow("llama/tied", "ddp=2 cp=2 pp=2 schedule=Interleaved1F1B", "never"),
    slow("qwen/moe", "fsdp=2 tp=2 cp=2 ep=4"),
    slow("qwen/moe", "fsdp=2 tp=2 cp=2 ep=2 etp=2", "recompute"),
    slow("qwen/moe", "ddp=2 fsdp=2 tp=2 ep=4", "accumulate"),
    slow("qwen/moe", "fsdp=2 tp=2 pp=2 ep=2 etp=2", "by-op"),
    slow("qwen/moe", "tp=2 cp=2 pp=2 ep=4", "chunked"),
    slow("qwen/moe", "fsdp=2 cp=2 pp=2 ep=2", "bf16 forced"),
    slow("llama/tied", "tp=2 cp=2", "compile"),
    slow("llama/tied", "tp=2 pp=2", "compile recompute"),
    slow("llama/tied", "cp=2 pp=2 rotate=alltoall", "compile by-op"),
    slow("qwen/moe", "fsdp=2 pp=2 ep=2", "compile"),
    slow("llama/tied", "fsdp=2 tp=2 cp=2 pp=2"),
    slow("llama/tied", "ddp=2 fsdp=2 tp=2 pp=2 schedule=Interleaved1F1B"),
    slow("qwen/moe", "fsdp=2 tp=2 cp=2 pp=2 ep=4"),
    slow("qwen/moe", "ddp=2 fsdp=2 cp=2 pp=2 ep=2"),
)
"""Three axes and more, on 8 and 16 ranks."""

FAMILIES = (
    slow("mistral/small", "tp=2 cp=2"),
    slow("mistral/small", "cp=2 rotate=alltoall balance=none", "causal"),
    slow("mistral/small", "fsdp=2 pp=2 schedule=Interleaved1F1B"),
    slow("mistral/small", "cp=4 rotate=ulysses", "causal"),
    fast("gemma/small", "tp=2 cp=2 rotate=alltoall"),
    slow("gemma/small", "fsdp=2 pp=2", "recompute"),
    slow("gemma/small", "tp=2", "causal compile"),
    slow("gemma/small", "cp=2", "causal"),
    slow("gemma/small", "fsdp=2 tp=2", "bf16"),
    slow("gemma/small", "tp=2 cp=2 pp=2", "chunked"),
    fast("gpt_oss/small", "tp=2 cp=2 ep=2"),
    slow("gpt_oss/small", "fsdp=2 pp=2 ep=2", "recompute"),
    slow("gpt_oss/small", "tp=2 etp=2", "by-op"),
    slow("gpt_oss/small", "fsdp=2 tp=2 ep=2 etp=2"),
    slow("gpt_oss/small", "cp=2 rotate=alltoall"),
    slow("gpt_oss/small", "cp=2 rotate=ulysses balance=none"),
    slow("gpt_oss/small", "fsdp=2 ep=2", "compile"),
    slow("gpt_oss/small", "fsdp=2 cp=2 ep=4", "offload"),
    slow("gpt_oss/small", "tp=2 cp=2 pp=2 ep=2", "accumulate"),
    fast("llama4/small", "tp=2 cp=2 ep=2"),
    slow("llama4/small", "fsdp=2 pp=2 ep=2", "causal"),
    slow("llama4/small", "tp=2 etp=2", "selective"),
    slow("llama4/small", "cp=2 rotate=alltoall", "causal"),
    slow("llama4/small", "cp=2 rotate=ulysses"),
    slow("llama4/small", "tp=2 ep=2", "compile"),
    slow("llama4/small", "fsdp=2 tp=2 ep=2 etp=2", "by-op"),
    slow("llama4/small", "tp=2 cp=2 pp=2 ep=2", "accumulate"),
)
"""Windows, chunks, sinks, norms and routers of other kinds."""

IN_ONE_PROCESS = (
    slow("llama/even", "tp=2 cp=2", "local-tensor"),
    fast("llama/even", "tp=2", "local-tensor by-op chunked"),
    slow("llama/even", "tp=4", "local-tensor accumulate gathered-logits"),
    slow("llama/even", "cp=2 rotate=alltoall", "local-tensor recompute"),
    slow("llama/even", "cp=2 rotate=ulysses balance=none", "local-tensor"),
    slow("llama/even", "cp=2", "local-tensor causal"),
    slow("qwen/even", "tp=2 cp=2", "local-tensor"),
    slow("qwen/even", "tp=2 etp=2", "local-tensor"),
    refused(
        "llama/even",
        "fsdp=2 tp=2",
        "local-tensor",
        '--parallelism.data_parallel_shard_degree=2: with comm.mode = "local_tensor" there is no data parallelism:'
        " FSDP2 resizes storages, which torch's LocalTensor does not have; start 2 in all: context × tensor",
    ),
    refused(
        "llama/even",
        "pp=2",
        "local-tensor",
        '--parallelism.pipeline_parallel_degree=2: with comm.mode = "local_tensor" all ranks run one program, but'
        " stages run different ones; set it to 1",
    ),
    refused(
        "qwen/even",
        "tp=2 ep=2",
        "local-tensor",
        '--parallelism.expert_parallel_degree=2: with comm.mode = "local_tensor" ranks cannot send different numbers of'
        " tokens; set it to 1",
    ),
    refused(
        "llama/untied",
        "tp=2",
        "local-tensor compile",
        '--compile.enable: with comm.mode = "local_tensor" torch cannot trace attention with a mask; set it to false\n'
        '--parallelism.tensor_parallel_degree=2: with comm.mode = "local_tensor" all ranks\' pieces are as long, but 2'
        " does not divide 67 (vocab_size); take a degree that does\n"
        '--parallelism.tensor_parallel_degree=2: with comm.mode = "local_tensor" all ranks\' pieces are as long, but 2'
        " does not divide 43 (ffn_hidden); take a degree that does",
    ),
)
"""All ranks in one process."""

MATRIX: tuple[Layout, ...] = (*DATA, *TENSOR, *CONTEXT, *PIPELINE, *EXPERT, *MANY, *FAMILIES, *IN_ONE_PROCESS)

AHEAD = (
    fast("deepseek/moe", "fsdp=2 ep=2", "recompute always"),
    fast("deepseek/moe", "tp=2"),
    fast("deepseek/moe", "cp=2"),
    fast("deepseek/moe", "pp=2", "chunked"),
    slow("deepseek/moe", "ddp=2", "accumulate by-op"),
    slow("deepseek/moe", "fsdp=2", "offload never"),
    slow("deepseek/moe", "fsdp=2", "compile"),
    slow("deepseek/dense", "fsdp=2", "compile chunked"),
    slow("deepseek/dense", "tp=2", "compile"),
    slow("deepseek/dense", "tp=4", "gathered-logits"),
    slow("deepseek/moe", "tp=2 ep=2", "accumulate selective"),
    slow("deepseek/moe", "fsdp=2 tp=2 ep=2 etp=2"),
    slow("deepseek/moe", "cp=2 balance=none", "causal"),
    slow("deepseek/moe", "cp=2 rotate=alltoall"),
    slow("deepseek/moe", "cp=2 rotate=alltoall", "causal"),
    slow("deepseek/moe", "cp=2 rotate=ulysses"),
    slow("deepseek/moe", "tp=2 cp=2 rotate=ulysses ep=4"),
    slow("deepseek/dense", "pp=2 schedule=Interleaved1F1B"),
    slow("deepseek/moe", "pp=2 schedule=ZBVZeroBubble"),
    slow("deepseek/moe", "fsdp=2 pp=2 ep=2", "always"),
    slow("deepseek/moe", "tp=2 cp=2 pp=2"),
    slow("deepseek/dense", 'pp=2 parts=[["tok_embeddings","layers.0","layers.1","layers.2","norm"],["output"]]'),
    slow("deepseek/even", "tp=2", "local-tensor"),
)
"""Latent attention, experts in groups and multi-token prediction: against one rank, since the plain loop does not look
ahead; one rank is held against the definition in `tests/models/deepseek_v3`."""
