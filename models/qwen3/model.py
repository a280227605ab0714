"""Qwen3: the model itself, dense or with experts. What it is made of stands in `components.layers`, how it is cut in
`parallelize.py`.
"""

from typing import cast

from torch import Tensor, nn

from components.layers.attention import Attention, AttentionMask
from components.layers.feed_forward import FeedForward
from components.layers.head import Head
from components.layers.initialize import Constant, Init, Normal
from components.layers.moe import MoE
from components.layers.rotary import Rotation, inverse_frequencies, rotation
from models.qwen3.args import Qwen3Args


class Block(nn.Module):
    """One pre-norm block: attention, then feed-forward or experts, each added to the residual stream."""

    def __init__(self, args: Qwen3Args) -> None:
        super().__init__()
        self.attention = Attention(args.dim, args.n_heads, args.n_kv_heads, args.head_dim, qk_norm_eps=args.norm_eps)
        self.attention_norm = nn.RMSNorm(args.dim, eps=args.norm_eps)
        self.ffn_norm = nn.RMSNorm(args.dim, eps=args.norm_eps)
        if args.experts is None:
            self.feed_forward = FeedForward(args.dim, args.ffn_hidden)
            self.moe = None
        else:
            self.moe = MoE(
                args.dim,
                args.experts.hidden,
                args.experts.count,
                args.experts.per_token,
                normalize=args.experts.normalize,
                balance_coefficient=args.experts.balance_coefficient,
                bias_rate=args.experts.bias_rate,
                force_balance=args.experts.force_balance,
            )

    def forward(
        self, x: Tensor, turn: Rotation, mask: Tensor | None, positions: Tensor, shares: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """# (rows, seq, dim) → (rows, seq, dim), and what `MoE` returns besides"""
        x = x + self.attention(self.attention_norm(x), turn, mask)
        if self.moe is None:
            return x + self.feed_forward(self.ffn_norm(x)), None
        out, counts = self.moe(self.ffn_norm(x), positions, shares)
        return x + out, counts


class Qwen3(nn.Module):
    """The decoder. It holds no buffers but the experts' selection biases."""

    def __init__(self, args: Qwen3Args) -> None:
        super().__init__()
        self.args = args
        self.mask = AttentionMask()
        self.tok_embeddings = nn.Embedding(args.vocab_size, args.dim)
        self.layers = nn.ModuleDict({str(i): Block(args) for i in range(args.n_layers)})
        self.norm = nn.RMSNorm(args.dim, eps=args.norm_eps)
        self.output = Head(args.dim, args.vocab_size)
        if args.tied_embeddings:
            self.output.weight = self.tok_embeddings.weight

    def forward(
        self, x: Tensor, positions: Tensor, document_ids: Tensor | None = None, shares: Tensor | None = None
    ) -> Tensor:
        """Hidden states after the final norm; `output` makes logits of them.

        A pipeline stage has `nn.Identity` where another stage has a module, and fewer blocks.

        Args:
            x: Token ids, int64 # (rows, seq), or in a later stage hidden states. # (rows, seq, dim)
            positions: Position of each token, int64. # (rows, seq)
            document_ids: Number of each token's document: attention stays within it. None: plain causal. # (rows, seq)
            shares: Each token's share of the step's loss (`TrainSpec.inputs`), for what balances experts; None: not
                training. # (rows, seq)

        Returns:
            # (rows, seq, dim)
        """
        mask = self.mask(document_ids)
        turn = rotation(positions, inverse_frequencies(self.args.head_dim, self.args.rope_theta, None, x.device))
        x = self.tok_embeddings(x)
        for block in self.layers.values():
            x, counts = block(x, turn, mask, positions, shares)
            if counts is not None:
                cast(MoE, block.moe).observe(counts)  # out here, since a block may be recomputed
        return self.norm(x)

    def inits(self) -> dict[str, Init]:
        """How each parameter is initialized, by name: as Llama 3 is, experts like the feed-forward matrices that they
        stand for, routers like any other matrix."""
        args = self.args
        matrix, one = Normal(0.02), Constant(1.0)
        head = Normal(args.dim**-0.5, cutoff=3.0)
        table: dict[str, Init] = {"tok_embeddings.weight": head if args.tied_embeddings else Normal(1.0)}
        for i in range(args.n_layers):
            into_stream = Normal(0.02 / (2 * (i + 1 if args.depth_init else args.n_layers)) ** 0.5)
            block: dict[str, Init] = {f"attention.{name}.weight": matrix for name in ("wq", "wk", "wv")}
            block |= {f"attention.{name}.weight": one for name in ("q_norm", "k_norm")}
            block |= {"attention.wo.weight": into_stream, "attention_norm.weight": one, "ffn_norm.weight": one}
            feed_forward = {"w1": matrix, "w2": into_stream, "w3": matrix}
            if args.experts is None:
                block |= {f"feed_forward.{name}.weight": init for name, init in feed_forward.items()}
            else:
                block |= {f"moe.experts.{name}": init for name, init in feed_forward.items()}
                block |= {"moe.router.gate.weight": matrix}
            table |= {f"layers.{i}.{name}": init for name, init in block.items()}
        return table | {"norm.weight": one, "output.weight": head}
