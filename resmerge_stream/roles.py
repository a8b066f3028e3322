"""A parameter's role from its name and shape: what part of a model it is.

Two schemes. `role_of` knows the names of today's architectures. `release_role_of` repeats the
substring rules of the authors' release word for word, because its variants must reproduce it.
"""

import re
from enum import StrEnum


class Role(StrEnum):
    """What part of a model a tensor is."""

    ATTENTION = "attention"
    FFN = "ffn"
    MATRIX = "matrix"
    ROUTER = "router"
    EMBEDDING = "embedding"
    HEAD = "head"
    NORM = "norm"
    VECTOR = "vector"
    BUFFER = "buffer"


# The roles whose tensors are matrices to decompose (paper A.2: two-dimensional weights other
# than embeddings and the LM head).
MATRIX_ROLES = frozenset({Role.ATTENTION, Role.FFN, Role.MATRIX, Role.ROUTER})

_EMBEDDING = re.compile(
    r"(^|\.)(embed_tokens\w*|tok_embeddings|word_embeddings|position_embeddings|"
    r"token_type_embeddings|wte|wpe|embed_in|embed_positions|patch_embed\w*|shared)(\.|$)|"
    r"embeddings?\.weight$"
)
_HEAD = re.compile(r"(^|\.)(lm_head|embed_out|shared_head\.head|score|classifier)(\.|$)")
_LLAMA_HEAD = re.compile(r"^output\.weight$")
_NORM = re.compile(r"(norm|(^|[._])ln(_|\.|\d|$)|layernorm)", re.IGNORECASE)
_BUFFER = re.compile(r"(rotary_emb|inv_freq|(?:^|\.)attn\.bias$|masked_bias|position_ids)")
_ROUTER = re.compile(r"(router|(mlp|moe|block_sparse_moe|ffn)\.gate\.|shared_expert_gate)")
_ATTENTION = re.compile(
    r"(attn|attention|(^|[._])[qkvo]_proj|qkv|query|key_value|out_proj|"
    r"q_a_proj|q_b_proj|kv_a_proj|kv_b_proj|\.c_attn|wq|wk|wv|wo)"
)
_FFN = re.compile(
    r"(mlp|ffn|feed_forward|experts?|moe|gate_proj|up_proj|down_proj|gate_up_proj|"
    r"dense_h_to_4h|dense_4h_to_h|fc\d|(^|\.)w[123](\.|$))"
)


def role_of(name: str, shape: tuple[int, ...]) -> Role:
    """Return the role of a parameter by the names that current architectures use.

    Args:
        name: the parameter name.
        shape: its shape; one-dimensional tensors are never matrices.

    Returns:
        The role. A matrix with an unknown name is `Role.MATRIX`.
    """
    if _BUFFER.search(name):
        return Role.BUFFER
    if _NORM.search(name.rsplit(".", 1)[0] if "." in name else name) and len(shape) < 2:
        return Role.NORM
    if len(shape) < 2:
        return Role.VECTOR
    if _EMBEDDING.search(name):
        return Role.EMBEDDING
    if _HEAD.search(name) or _LLAMA_HEAD.search(name):
        return Role.HEAD
    if _ROUTER.search(name):
        return Role.ROUTER
    if _ATTENTION.search(name):
        return Role.ATTENTION
    if _FFN.search(name):
        return Role.FFN
    return Role.MATRIX


def release_role_of(name: str, shape: tuple[int, ...]) -> Role:
    """Return the role by the authors' release (lower-cased substrings, in its order).

    Source: sunyd0303-cpu/ResMerge-release, commits 0d8ebbe and 2d6d805.
    """
    low = name.lower()
    if any(key in low for key in ("embed_tokens", "wte", "word_embeddings")):
        return Role.EMBEDDING
    if "lm_head" in low:
        return Role.HEAD
    if any(key in low for key in ("norm", "ln_", "layernorm")):
        return Role.NORM
    if len(shape) < 2:
        return Role.VECTOR
    attention = ("self_attn", ".attn.", "attention", "q_proj", "k_proj", "v_proj", "o_proj")
    if any(key in low for key in attention):
        return Role.ATTENTION
    ffn = ("mlp", "ffn", "feed_forward", "gate_proj", "up_proj", "down_proj")
    if any(key in low for key in ffn):
        return Role.FFN
    return Role.MATRIX


_LAYER = re.compile(r"(?:^|\.)(?:layers?|h|blocks?|block)\.(\d+)(?:\.|$)")


def layer_of(name: str) -> int | None:
    """Return the number of the block that a parameter belongs to, or None outside the blocks."""
    found = _LAYER.search(name)
    return int(found.group(1)) if found else None


def module_of(name: str) -> str:
    """Return the last meaningful part of a name: ``q_proj`` for ``…self_attn.q_proj.weight``."""
    parts = [p for p in name.split(".") if p not in ("weight", "bias") and not p.isdigit()]
    return parts[-1] if parts else name
