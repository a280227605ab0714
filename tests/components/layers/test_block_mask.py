"""Block masks against bool masks, on the CPU: flex attention has no compiled backward there, so graphs are run as they
are traced, and the check that forbids gradients is taken out."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import flex_attention

from components.config.compute import ActivationCheckpoint, Compile
from components.layers import block_mask
from components.layers.attention import AttentionMask, InnerAttention, takes_blocks
from components.layers.block_mask import Blocks, blocks
from components.layers.shapes import AttentionShape, LatentShape, Reach, Rope
from components.mesh.batch import Part
from components.parallel.compile import compile_blocks
from components.parallel.recompute import recompute
from models.decoder.args import DecoderArgs
from models.decoder.model import Decoder
from models.decoder.plan import decoder_plan
from models.llama3.args import Llama3Args

SEQ = 300
DEVICE = torch.device("cpu")


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Flex attention, with gradients, wherever a mask may be of blocks."""
    compiled = torch.compile(block_mask._attend, backend="aot_eager", fullgraph=True)
    monkeypatch.setattr(block_mask, "_compiled", lambda: compiled)
    monkeypatch.setattr(block_mask, "usable", lambda positions: True)
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *tensors: None)
    yield
    torch.compiler.reset()


def packed(*rows: list[int]) -> tuple[Tensor, Tensor]:
    """Positions and document numbers of rows of documents of these lengths."""
    lengths = [torch.tensor(row) for row in rows]
    ids = [torch.arange(len(row)).repeat_interleave(row) for row in lengths]
    positions = [torch.cat([torch.arange(int(n)) for n in row]) for row in lengths]
    return torch.stack(positions), torch.stack(ids)


PACKED = packed([130, 1, 126, 43], [300], [1] * 20 + [270, 10])
REACHES = [Reach(), Reach(window=1), Reach(window=50), Reach(window=128), Reach(window=200), Reach(chunk=64)]
REACHES += [Reach(chunk=100), Reach(window=70, chunk=150), Reach(1000, 1000)]
CASES = [(reach, documents) for reach in REACHES for documents in (True, False)]
CASES = [
    (reach, documents) for reach, documents in CASES if documents or min(reach.window or 999, reach.chunk or 999) < SEQ
]


def both(reach: Reach, documents: bool, monkeypatch: pytest.MonkeyPatch) -> tuple[Blocks, Tensor]:
    """The mask in blocks, and the bool mask."""
    positions, ids = PACKED[0], PACKED[1] if documents else None
    dense = AttentionMask(reach)(positions, ids)
    monkeypatch.setattr(block_mask, "usable", lambda positions: True)
    made = AttentionMask(reach, in_blocks=True)(positions, ids)
    assert isinstance(made, Blocks)
    assert isinstance(dense, Tensor)
    return made, dense


def assert_equal(found: flex_attention.BlockMask, want: flex_attention.BlockMask) -> None:
    for name in ("kv_num_blocks", "kv_indices", "q_num_blocks", "q_indices"):
        for of in (name, f"full_{name}"):
            assert torch.equal(getattr(found, of), getattr(want, of)), of
    assert (found.seq_lengths, found.BLOCK_SIZE) == (want.seq_lengths, want.BLOCK_SIZE)


@pytest.mark.parametrize(("reach", "documents"), CASES)
def test_block_masks_are_what_torch_makes_of_the_bool_mask(
    reach: Reach, documents: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, dense = both(reach, documents, monkeypatch)
    rows = len(dense)
    rule = flex_attention.create_mask(made.mask.mask_mod, rows, 1, SEQ, SEQ, device="cpu")
    assert torch.equal(rule, dense)
    want = flex_attention.create_block_mask(lambda b, h, q, k: dense[b, 0, q, k], rows, None, SEQ, SEQ, device="cpu")
    assert_equal(made.mask, want)


@pytest.mark.parametrize("seq", [128, 129, 255, 256, 300])
def test_lengths_that_blocks_do_not_divide(seq: int) -> None:
    positions, ids = packed([100, seq - 100])
    made = blocks(positions, ids, 90, None).mask
    allowed = AttentionMask(Reach(window=90))(positions, ids)
    want = flex_attention.create_block_mask(lambda b, h, q, k: allowed[b, 0, q, k], 1, None, seq, seq, device="cpu")
    assert_equal(made, want)


def gradients(mask: Any, inputs: list[Tensor], scale: float | None) -> list[Tensor]:
    out = InnerAttention(scale)(*inputs, mask)
    return [out, *torch.autograd.grad(out.sin().sum(), inputs)]


@pytest.mark.parametrize("heads", [(4, 4, 32, 32), (4, 2, 16, 16), (6, 1, 24, 16)], ids=str)
@pytest.mark.parametrize(("reach", "documents"), [(Reach(), True), (Reach(window=50), False), (Reach(chunk=100), True)])
def test_attention_by_blocks_is_attention_by_a_bool_mask_with_every_gradient(
    reach: Reach, documents: bool, heads: tuple[int, int, int, int], monkeypatch: pytest.MonkeyPatch, on_cpu: None
) -> None:
    generator = torch.Generator().manual_seed(0)
    made, dense = both(reach, documents, monkeypatch)
    n, kv, width, v_width = heads
    shapes = [(3, n, SEQ, width), (3, kv, SEQ, width), (3, kv, SEQ, v_width)]
    inputs = [torch.randn(shape, generator=generator, requires_grad=True) for shape in shapes]
    scale = None if v_width == width else 0.3
    wanted = gradients(dense, inputs, scale)
    for got, want in zip(gradients(made, inputs, scale), wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_other_documents_are_no_reason_to_compile_again(on_cpu: None) -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(1, 2, SEQ, 16, generator=generator, requires_grad=True) for _ in range(3)]
    attend = InnerAttention()
    for lengths in ([100, 200], [300]):
        positions, ids = packed(lengths)
        found = attend(*inputs, blocks(positions, ids, None, None))
        torch.testing.assert_close(found, attend(*inputs, AttentionMask(Reach())(positions, ids)), rtol=1e-4, atol=1e-5)
        torch.compiler.set_stance("fail_on_recompile")
    torch.compiler.set_stance("default")


@pytest.mark.slow  # a C++ compiler's seconds
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")
def test_compiled_for_the_cpu_it_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    made, dense = both(Reach(window=50), True, monkeypatch)
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(3, 2, SEQ, 16, generator=generator) for _ in range(3)]
    block_mask._compiled.cache_clear()
    found = InnerAttention()(*inputs, made)
    torch.testing.assert_close(found, InnerAttention()(*inputs, dense), rtol=1e-4, atol=1e-5)
    torch.compiler.reset()


def test_where_masks_stay_bool(monkeypatch: pytest.MonkeyPatch) -> None:
    positions, ids = PACKED
    assert isinstance(AttentionMask(Reach(), True)(positions, ids), Tensor)  # on a CPU
    monkeypatch.setattr(block_mask, "usable", lambda positions: True)
    assert isinstance(AttentionMask(Reach(), False)(positions, ids), Tensor)
    part = Part(torch.arange(SEQ), SEQ, lambda x: x)
    assert isinstance(AttentionMask(Reach(), True)(positions, ids, part), Tensor)
    assert AttentionMask(Reach(window=SEQ), True)(positions, None) is None


def test_which_attention_takes_blocks() -> None:
    plain = AttentionShape(4, 2, 16, Rope(100.0))
    assert takes_blocks(plain)
    assert not takes_blocks(AttentionShape(4, 2, 16, Rope(100.0), sinks=True))
    assert not takes_blocks(AttentionShape(4, 2, 8, Rope(100.0)))
    latent = functools.partial(LatentShape, n_heads=2, q_rank=0, kv_rank=8, nope_dim=8, rope_dim=8, rope=Rope(100.0))
    assert takes_blocks(latent(v_dim=16))
    assert not takes_blocks(latent(v_dim=8))


def test_a_device_without_it_is_told(caplog: pytest.LogCaptureFixture) -> None:
    assert not block_mask.works.__wrapped__(DEVICE)
    [text] = [text for name, _, text in caplog.record_tuples if name == "espalier"]
    assert text.startswith("attention masks: flex attention does not work on cpu (Unsupported: ")
    assert text.endswith("): masks are bool, seq² bytes a row")


def test_the_trial_finds_what_is_right_and_what_is_wrong(monkeypatch: pytest.MonkeyPatch, on_cpu: None) -> None:
    eager = functools.partial(torch.compile, backend="aot_eager")
    monkeypatch.setattr(torch, "compile", eager)
    assert block_mask._trial(DEVICE) == ""
    right = block_mask._attend
    monkeypatch.setattr(block_mask, "_attend", lambda q, k, v, mask, scale: right(q, k, v, mask, scale) * 1.5)
    assert block_mask._trial(DEVICE).startswith("it is wrong by ")


ARGS = Llama3Args(dim=64, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=64, max_seq_len=512, ffn_hidden=48)


def step(args: DecoderArgs, change: Callable[[nn.Module], None] = lambda model: None) -> dict[str, Tensor]:
    """Gradients of a model at rows of documents."""
    torch.manual_seed(0)
    model = Decoder(args)
    change(model)
    positions, ids = PACKED
    hidden = model(torch.arange(3 * SEQ).reshape(3, SEQ) % args.vocab_size, positions, ids)
    hidden.sin().sum().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def recomputed(**settings: Any) -> Callable[[nn.Module], None]:
    return lambda model: recompute(model, decoder_plan(ARGS), ActivationCheckpoint(**settings))


def compiled(model: nn.Module) -> None:
    recompute(model, decoder_plan(ARGS), ActivationCheckpoint(mode="selective", selective_ac_option="op"))
    compile_blocks(model, decoder_plan(ARGS), Compile(enable=True, backend="aot_eager"))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
@pytest.mark.parametrize(
    "change",
    [
        lambda model: None,
        recomputed(mode="full"),
        recomputed(mode="selective", selective_ac_option="op"),
        compiled,
    ],
    ids=["plain", "full", "op", "compiled"],
)
def test_models_train_alike_with_either_mask(
    change: Callable[[nn.Module], None], request: pytest.FixtureRequest
) -> None:
    want = step(ARGS)
    request.getfixturevalue("on_cpu")
    found = step(ARGS, change)
    assert found.keys() == want.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, want[name], rtol=1e-3, atol=1e-4, msg=name)
