"""The decoder itself. What it is made of stands in `components.layers`, how it is cut in `plan.py`."""

from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from components.layers.attention import Attention, AttentionMask, Mask, takes_blocks
from components.layers.feed_forward import FeedForward
from components.layers.head import Head
from components.layers.initialize import Init, Normal
from components.layers.latent import LatentAttention
from components.layers.moe import MoE
from components.layers.mtp import Ahead
from components.layers.norm import norm, norm_inits
from components.layers.rotary import Rotation, rotation
from components.layers.shapes import AttentionShape, ExpertsShape, Reach
from models.decoder.args import BlockShape, DecoderArgs


class Block(nn.Module):
    """One block: attention, then feed-forward or experts, each normed and added to the residual stream."""

    def __init__(self, args: DecoderArgs, shape: BlockShape) -> None:
        super().__init__()
        self.shape = shape
        self.attention = (
            Attention(args.dim, shape.attention, args.norms)
            if isinstance(shape.attention, AttentionShape)
            else LatentAttention(args.dim, shape.attention)
        )
        self.attention_norm = norm(args.dim, args.norms)
        self.ffn_norm = norm(args.dim, args.norms)
        self.attention_post_norm, self.ffn_post_norm = (
            norm(args.dim, args.norms) if shape.sandwich else None for _ in range(2)
        )
        self.moe: MoE | None = None
        self.feed_forward: FeedForward | None = None
        if isinstance(shape.feed_forward, ExpertsShape):
            self.moe = MoE(args.dim, shape.feed_forward)
        else:
            self.feed_forward = FeedForward(args.dim, shape.feed_forward)

    def forward(
        self, x: Tensor, turn: Rotation | None, mask: Mask, positions: Tensor, shares: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """# (rows, seq, dim) → (rows, seq, dim), and what `MoE` returns besides"""
        out, counts = self.attention(self.attention_norm(x), turn, mask, positions), None
        x = x + (out if self.attention_post_norm is None else self.attention_post_norm(out))
        if self.moe is not None:
            out, counts = self.moe(self.ffn_norm(x), positions, shares)
        else:
            out = cast(FeedForward, self.feed_forward)(self.ffn_norm(x))
        return x + (out if self.ffn_post_norm is None else self.ffn_post_norm(out)), counts

    def inits(self, matrix: Init, into_stream: Init) -> dict[str, Init]:
        """How the parameters of its layers are initialized, by name."""
        into_stream = matrix if self.shape.sandwich else into_stream  # normed to size 1 whatever it is
        layers = {"attention": self.attention, "feed_forward": self.feed_forward, "moe": self.moe}
        of = {name: layer.inits(matrix, into_stream) for name, layer in layers.items() if layer is not None}
        return {f"{name}.{leaf}": init for name, inits in of.items() for leaf, init in inits.items()}


class Decoder(nn.Module):
    """The model. It holds no buffers but the experts' selection biases, so that it can be built on the meta device."""

    def __init__(self, args: DecoderArgs) -> None:
        super().__init__()
        self.args = args
        blocks = args.blocks
        kinds = [block.attention for block in (*blocks, *args.ahead)]
        self.reaches = list(dict.fromkeys(kind.reach for kind in kinds))
        self.masks = nn.ModuleList(
            AttentionMask(reach, all(takes_blocks(kind) for kind in kinds if kind.reach == reach))
            for reach in self.reaches
        )
        self.tok_embeddings = nn.Embedding(args.vocab_size, args.dim)
        self.layers = nn.ModuleDict({str(i): Block(args, shape) for i, shape in enumerate(blocks)})
        ahead = (Ahead(args.dim, args.norms, Block(args, shape)) for shape in args.ahead)
        self.mtp = nn.ModuleDict({str(i): module for i, module in enumerate(ahead)})
        self.mtp_norms = nn.ModuleDict({name: norm(args.dim, args.norms) for name in self.mtp})
        self.norm = norm(args.dim, args.norms)
        self.output = Head(args.dim, args.vocab_size)
        if args.tied_embeddings:
            self.output.weight = self.tok_embeddings.weight

    def forward(
        self,
        x: Tensor,
        positions: Tensor,
        document_ids: Tensor | None = None,
        shares: Tensor | None = None,
        ahead: Tensor | None = None,
        ahead_shares: Tensor | None = None,
    ) -> Tensor:
        """Hidden states after the final norm; `output` makes logits of them.

        A pipeline stage has `nn.Identity` where another stage has a module, and fewer blocks.

        Args:
            x: Token ids, int64 # (rows, seq), or in a later stage hidden states. # (rows, seq, dim)
            positions: Position of each token, int64. # (rows, seq)
            document_ids: Number of each token's document: attention stays within it. None: plain causal. # (rows, seq)
            shares: Each token's share of the step's loss (`TrainSpec.inputs`), for what balances experts; None: not
                training. # (rows, seq)
            ahead: In training, for multi-token prediction: the token k places later, for k = 1 … depth. # (rows, seq,
                depth)
            ahead_shares: As `shares`, by the labels that follow those tokens. # (rows, seq, depth)

        Returns:
            # (rows, seq, dim); in the stage with the head, if it looks ahead, followed by the rows of each module, to
            predict those labels from: (rows · (1 + depth), seq, dim)
        """
        blocks = [cast(Block, block) for block in self.layers.values()]
        looks = ahead is not None and not isinstance(self.mtp, nn.Identity)
        modules = [
            (module, cast(Block, module.block)) for module in cast(list[Ahead], [*self.mtp.values()] if looks else [])
        ]
        around = self._around([*blocks, *(block for _, block in modules)], positions, document_ids)
        x = self.embed(x)
        for block in blocks:
            x = self._observed(block, block(x, *around(block), positions, shares))
        found = [self.norm(x)]
        for depth, (module, block) in enumerate(modules):
            token = self.embed(cast(Tensor, ahead)[..., depth])
            share = None if ahead_shares is None else ahead_shares[..., depth]
            out = module(found[-1], token, *around(block), positions, share)
            found.append(self.mtp_norms[str(depth)](self._observed(block, out)))
        return torch.cat(found) if modules else found[0]

    def _around(
        self, blocks: Sequence[Block], positions: Tensor, document_ids: Tensor | None
    ) -> Callable[[Block], tuple[Rotation | None, Mask]]:
        """What each block gets besides its input: one rotation of a kind for all, and one mask."""
        masks = self._masks({block.shape.attention.reach for block in blocks}, positions, document_ids)
        kinds = dict.fromkeys((b.shape.attention.rope, b.shape.attention.rotary_width) for b in blocks)
        turns = {(rope, width): rotation(positions, width, rope) if rope else None for rope, width in kinds}
        of = {block: block.shape.attention for block in blocks}
        return lambda block: (turns[of[block].rope, of[block].rotary_width], masks[of[block].reach])

    def _observed(self, block: Block, out: tuple[Tensor, Tensor | None]) -> Tensor:
        """A block's hidden states. Its counts are noted out here, since a block may be recomputed."""
        x, counts = out
        if counts is not None:
            cast(MoE, block.moe).observe(counts)
        return x

    def embed(self, x: Tensor) -> Tensor:
        """Embedded tokens; hidden states, which later stages get, as they are."""
        if x.is_floating_point():
            return x
        embedded = self.tok_embeddings(x)
        scale = self.args.embedding_scale
        if scale == 1.0:
            return embedded
        return embedded * torch.tensor(scale, dtype=embedded.dtype)  # rounded to the type of compute, as published

    def _masks(self, needed: set[Reach], positions: Tensor, document_ids: Tensor | None) -> dict[Reach, Mask]:
        kinds = zip(self.reaches, self.masks, strict=True)
        return {reach: mask(positions, document_ids) for reach, mask in kinds if reach in needed}

    def inits(self) -> dict[str, Init]:
        """How each parameter is initialized, by name.

        Embedding N(0, 1) once scaled, matrices N(0, 0.02), norms as if they had no weight; the matrices that write to
        the residual stream are smaller the deeper they stand (`depth_init`), so that its variance grows slowly; the
        head, truncated at three deviations, has the deviation that makes logits of about variance 1. A tied matrix
        starts as the head: as the embedding it would give logits of deviation √dim, while the norms make a small
        embedding as good as a large one. Experts start like the feed-forward matrices that they stand for, routers like
        any other matrix.
        """
        args = self.args
        head = Normal(args.dim**-0.5, cutoff=3.0)
        embedding = head if args.tied_embeddings else Normal(1.0 / args.embedding_scale)
        table: dict[str, Init] = {"tok_embeddings.weight": embedding}
        matrix, ahead = Normal(0.02), {} if isinstance(self.mtp, nn.Identity) else dict(self.mtp.items())
        blocks = {f"layers.{name}": (block, int(name) + 1) for name, block in self.layers.items()}
        blocks |= {f"mtp.{k}.block": (module.block, args.n_layers + int(k) + 1) for k, module in ahead.items()}
        for name, (block, depth) in blocks.items():
            into_stream = Normal(0.02 / (2 * (depth if args.depth_init else args.n_layers)) ** 0.5)
            for leaf, init in cast(Block, block).inits(matrix, into_stream).items():
                table[f"{name}.{leaf}"] = init
        table |= {f"mtp.{k}.eh_proj.weight": matrix for k in ahead}
        return table | norm_inits(self) | {"output.weight": head}
