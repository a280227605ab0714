"""Llama 3: the model itself. What it is made of stands in `components.layers`, how it is cut in `parallelize.py`."""

from torch import Tensor, nn

from components.layers.attention import Attention, AttentionMask
from components.layers.feed_forward import FeedForward
from components.layers.head import Head
from components.layers.initialize import Constant, Init, Normal
from components.layers.rotary import Rotation, inverse_frequencies, rotation
from models.llama3.args import Llama3Args


class Block(nn.Module):
    """One pre-norm block: attention, then feed-forward, each added to the residual stream."""

    def __init__(self, args: Llama3Args) -> None:
        super().__init__()
        self.attention = Attention(args.dim, args.n_heads, args.n_kv_heads, args.head_dim)
        self.feed_forward = FeedForward(args.dim, args.ffn_hidden)
        self.attention_norm = nn.RMSNorm(args.dim, eps=args.norm_eps)
        self.ffn_norm = nn.RMSNorm(args.dim, eps=args.norm_eps)

    def forward(self, x: Tensor, turn: Rotation, mask: Tensor | None) -> Tensor:
        """# (rows, seq, dim) → (rows, seq, dim)"""
        x = x + self.attention(self.attention_norm(x), turn, mask)
        return x + self.feed_forward(self.ffn_norm(x))


class Llama3(nn.Module):
    """The decoder. Holds parameters only, no buffers, so that it can be built on the meta device."""

    def __init__(self, args: Llama3Args) -> None:
        super().__init__()
        self.args = args
        self.mask = AttentionMask()
        self.tok_embeddings = nn.Embedding(args.vocab_size, args.dim)
        self.layers = nn.ModuleDict({str(i): Block(args) for i in range(args.n_layers)})
        self.norm = nn.RMSNorm(args.dim, eps=args.norm_eps)
        self.output = Head(args.dim, args.vocab_size)
        if args.tied_embeddings:
            self.output.weight = self.tok_embeddings.weight

    def forward(self, x: Tensor, positions: Tensor, document_ids: Tensor | None = None) -> Tensor:
        """Hidden states after the final norm; `output` makes logits of them.

        A pipeline stage has `nn.Identity` where another stage has a module, and fewer blocks.

        Args:
            x: Token ids, int64 # (rows, seq), or in a later stage hidden states. # (rows, seq, dim)
            positions: Position of each token, int64. # (rows, seq)
            document_ids: Number of each token's document: attention stays within it. None: plain causal. # (rows, seq)

        Returns:
            # (rows, seq, dim)
        """
        mask = self.mask(document_ids)
        turn = rotation(positions, self._frequencies(positions))
        x = self.tok_embeddings(x)
        for block in self.layers.values():
            x = block(x, turn, mask)
        return self.norm(x)

    def inits(self) -> dict[str, Init]:
        """How each parameter is initialized, by name.

        Embedding N(0, 1), matrices N(0, 0.02), norms 1; the matrices that write to the residual stream are smaller
        the deeper they stand (`depth_init`), so that its variance grows slowly; the head, truncated at three
        deviations, has the deviation that makes logits of about variance 1. A tied matrix starts as the head: as the
        embedding it would give logits of deviation √dim, while the norms make a small embedding as good as a large
        one.
        """
        args = self.args
        matrix, one = Normal(0.02), Constant(1.0)
        head = Normal(args.dim**-0.5, cutoff=3.0)
        table: dict[str, Init] = {"tok_embeddings.weight": head if args.tied_embeddings else Normal(1.0)}
        for i in range(args.n_layers):
            into_stream = Normal(0.02 / (2 * (i + 1 if args.depth_init else args.n_layers)) ** 0.5)
            block: dict[str, Init] = {f"attention.{name}": matrix for name in ("wq", "wk", "wv")}
            block |= {"attention.wo": into_stream, "attention_norm": one, "ffn_norm": one}
            block |= {"feed_forward.w1": matrix, "feed_forward.w2": into_stream, "feed_forward.w3": matrix}
            table |= {f"layers.{i}.{name}.weight": init for name, init in block.items()}
        return table | {"norm.weight": one, "output.weight": head}

    def _frequencies(self, positions: Tensor) -> Tensor:
        args = self.args
        return inverse_frequencies(args.head_dim, args.rope_theta, args.rope_scaling, positions.device)
