"""What families share of Hugging Face's names: a decoder of attention, feed-forward, norms and a head. Torch-free.

A family adds what its blocks have besides. Names that only one family has stand with that family.
"""

from collections.abc import Mapping

from components.checkpoint.names import Rename, Rule, TheirsAlone

OURS, THEIRS = "layers.{layer}.", "model.layers.{layer}."
"""What the names in a block begin with."""
HEAD = "lm_head.weight"
EMBEDDING = "model.embed_tokens.weight"
BLOCK = {
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
"""Modules of every block: ours → theirs."""
MATRICES = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
"""Of a feed-forward with a gate."""
FEED_FORWARD = {f"feed_forward.{ours}": f"mlp.{theirs}" for ours, theirs in MATRICES.items()}
"""Modules of a dense block."""


def decoder(modules: Mapping[str, str], *more: Rule, tied: bool) -> tuple[Rule, ...]:
    """The table of a whole decoder, in the order of the model. `modules`: those in each block that have a weight;
    `more`: what else is in it; `tied`: there is no head of its own."""
    head = () if tied else (Rename("output.weight", HEAD),)
    blocks = [Rename(f"{OURS}{ours}.weight", f"{THEIRS}{theirs}.weight") for ours, theirs in modules.items()]
    return (
        Rename("tok_embeddings.weight", EMBEDDING),
        *blocks,
        *more,
        Rename("norm.weight", "model.norm.weight"),
        *head,
    )


def tied_head(tied: bool) -> tuple[TheirsAlone, ...]:
    """The head that published files of a tied model may hold besides: it must be the embedding."""
    return (TheirsAlone(HEAD, same_as=EMBEDDING),) if tied else ()
