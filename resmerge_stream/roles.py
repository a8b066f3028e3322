"""A parameter's role from its name and shape: what part of a model it is.

Two schemes. `role_of` knows the names of today's architectures. `release_role_of` repeats the
substring rules of the authors' release word for word, because its variants must reproduce it.
"""

import re
from collections.abc import Iterable
from enum import StrEnum


class Role(StrEnum):
    """What part of a model a tensor is.

    Linear maps are `ATTENTION`, `FFN`, `ROUTER` or, elsewhere, `MATRIX`; a `HEAD` is one whose rows
    are tokens. `EMBEDDING` is a table with a row for each token. `OTHER` is what else has several
    axes: positions, patches, learned queries, convolutions, state spaces, biases of experts.
    """

    ATTENTION = "attention"
    FFN = "ffn"
    MATRIX = "matrix"
    ROUTER = "router"
    EMBEDDING = "embedding"
    HEAD = "head"
    OTHER = "other"
    NORM = "norm"
    VECTOR = "vector"
    BUFFER = "buffer"


# The roles whose tensors are matrices to decompose (paper A.2: two-dimensional weights other
# than embeddings and the LM head). Routers are among them: they are linear maps too.
MATRIX_ROLES = frozenset({Role.ATTENTION, Role.FFN, Role.MATRIX, Role.ROUTER})

_BUFFER = re.compile(r"(rotary_emb|inv_freq|(?:^|\.)attn\.bias$|masked_bias|position_ids)")
_NORM = re.compile(r"(norm|(^|[._])ln(_|\.|\d|$)|layernorm)", re.IGNORECASE)
_EMBEDDING = re.compile(
    r"(^|\.)(embed_tokens\w*|embed_in|(\w+_)?tok(en)?s?_embed(ding)?s?|(word|input)_embeddings?|wte|"
    r"shared|embed|(?<!quantize\.)embeddings?|transformer\.w)\.weight$"
)
_HEAD = re.compile(
    r"(^|\.)((\w+_)?lm_heads?(\.(\d+|decoder|linear|out_proj))?|embed_out|unembed|lm_loss|"
    r"output_projection|shared_head\.head|pred_layer\.proj|predictions\.decoder)\.weight$|"
    r"^(output|head|decoder|proj_out|score|classifier)\.weight$"
)
# How the parameter of a linear map is called: nn.Linear's weight, experts' gate_up_proj, LSTMs'
# weight_hh_l0, attention's in_proj_weight, w1.
_LINEAR = re.compile(r"(^|_)(weight(_[ih]h_l\d\w*)?|proj(ection)?|linear)$|^[wv]\d$")
# Modules whose weight is none. Tables of something else than tokens, and what is added as it is;
# patches are convolutions in most models; hyper-connections mix whole streams by a few numbers.
_TABLE = re.compile(r"(^|_)(emb(ed(?!\w*(proj|map))\w*)?|wpe|token|bias\w*)$")
_NO_MAP = re.compile(r"(^|[._])patch_(emb(?!\w*proj)|proj)|hyper_connection")
# Parts of a multimodal model beside the text model.
OTHER_TOWER = re.compile(
    r"(^|\.)(vision|visual|image|audio|speech|vit|multi_modal|mm_)", re.IGNORECASE
)
_ROUTER = re.compile(
    r"(router|(mlp|moe|block_sparse_moe|ffn|feed_forward|mixer)\.gate\.|shared_expert_gate)"
)
_ATTENTION = re.compile(
    r"(attn|attention|(^|[._])[qkvo]_proj|qkv|query|key_value|"
    r"q_a_proj|q_b_proj|kv_a_proj|kv_b_proj|\.c_attn|(?<!mlp)(?<!Dense)\.w[qkvo][._])",
    re.IGNORECASE,
)
_FFN = re.compile(
    r"(mlp|ffn|feed_forward|experts?|moe|gate_proj|up_proj|down_proj|gate_up_proj|DenseReluDense|"
    r"dense_h_to_4h|dense_4h_to_h|fc\d|(^|\.)w[123](\.|$))"
)


def role_of(name: str, shape: tuple[int, ...]) -> Role:
    """Return the role of a parameter by the names that current architectures use.

    Args:
        name: the parameter name.
        shape: its shape; one-dimensional tensors are never matrices.

    Returns:
        The role. A linear map with an unknown name is `Role.MATRIX`.
    """
    if _BUFFER.search(name):
        return Role.BUFFER
    if len(shape) < 2:
        is_norm = _NORM.search(name.rsplit(".", 1)[0] if "." in name else name)
        return Role.NORM if is_norm else Role.VECTOR
    if _HEAD.search(name):
        return Role.HEAD
    if _EMBEDDING.search(name):
        return Role.EMBEDDING
    if not _is_linear_map(name, len(shape)):
        return Role.OTHER
    if _ROUTER.search(name):
        return Role.ROUTER
    if _ATTENTION.search(name):
        return Role.ATTENTION
    if _FFN.search(name):
        return Role.FFN
    return Role.MATRIX


def _is_linear_map(name: str, axes: int) -> bool:
    """Return whether a tensor is a matrix, or a stack of them, that activations go through."""
    path, _, leaf = name.rpartition(".")
    if axes > 3 or not _LINEAR.search(leaf) or _NO_MAP.search(name):
        return False
    module = module_of(path) if path else ""
    if "conv" in path.rsplit(".", 2)[-1] + module and (axes == 3 or leaf != "weight"):
        return False
    return leaf != "weight" or not (_TABLE.search(module) or _NORM.search(module))


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


def depth_of(names: Iterable[str]) -> int:
    """Return how many blocks a model has, by its tensors' names."""
    return 1 + max((n for name in names if (n := layer_of(name)) is not None), default=-1)


_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")


def pattern_of(name: str) -> str:
    """Return a name with a star for each number: ``model.layers.*.mlp.up_proj.weight``."""
    return _NUMBER.sub("*", name)


def module_of(name: str) -> str:
    """Return the last meaningful part of a name: ``q_proj`` for ``…self_attn.q_proj.weight``."""
    parts = [p for p in name.split(".") if p not in ("weight", "bias") and not p.isdigit()]
    return parts[-1] if parts else name
