"""A module of multi-token prediction (DeepSeek-V3, 2024, section 2.2): it carries the hidden states of each token, and
the token that follows so many places later, to hidden states that the head predicts one token further ahead from.

    h_k = norm_k(block(eh_proj [enorm(embedding of token i + k), hnorm(h_(k - 1) of token i)]))

The report leaves open which states a module gets. Here they are those that the head gets: normed, by the model's last
norm or by that of the module before; so do those who serve the published weights, and transformers. Embedding and head
are the model's own, which is why neither stands here. Nor does norm_k: like the model's last norm it stands between
blocks and head. (In the block's recomputation it would run before FSDP knows that experts are needed in backward.)
"""

import torch
from torch import Tensor, nn

from components.layers.attention import Mask
from components.layers.norm import norm
from components.layers.rotary import Rotation
from components.layers.shapes import NormShape


class Ahead(nn.Module):
    """One module, around a block of the model's kind."""

    def __init__(self, dim: int, norms: NormShape, block: nn.Module) -> None:
        """`block`: called as (x, turn, mask, positions, shares), it returns hidden states and something besides."""
        super().__init__()
        self.enorm, self.hnorm = norm(dim, norms), norm(dim, norms)
        self.eh_proj = nn.Linear(2 * dim, dim, bias=False)
        self.block = block

    def forward(
        self,
        hidden: Tensor,
        embedded: Tensor,
        turn: Rotation | None,
        mask: Mask,
        positions: Tensor,
        shares: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        """Hidden states and embeddings (rows, seq, dim) → hidden states before norm_k (rows, seq, dim), and what the
        block returns besides. The other arguments are the block's."""
        x = self.eh_proj(torch.cat((self.enorm(embedded), self.hnorm(hidden)), dim=-1))
        return self.block(x, turn, mask, positions, shares)
