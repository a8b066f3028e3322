"""Whether checkpoints may be merged: configs, names, shapes, tied heads, quantisation.

Every check returns problems (the merge is refused) or warnings (it goes on, and says so).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import Findings, Remedy, listed, shown
from ..roles import Role, role_of
from ..sources.checkpoint import Checkpoint, StoredTensor
from ..specs import DTYPES

# Kinds of warnings that the report says in numbers of its own.
KEPT_AS_IN_BASE, LEFT_OUT = "kept-as-in-base", "left-out"
# Config keys that change what the weights mean; any other difference is a warning.
STRUCTURE = {
    "layers": ("num_hidden_layers", "n_layer", "num_layers", "n_layers"),
    "attention heads": ("num_attention_heads", "num_key_value_heads", "n_head", "head_dim",
                        "multi_query", "attention_bias", "qk_norm", "use_qk_norm"),
    "widths": ("hidden_size", "intermediate_size", "n_embd", "n_inner", "d_model", "d_ff",
               "ffn_dim", "moe_intermediate_size", "q_lora_rank", "kv_lora_rank",
               "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"),
    "activation": ("hidden_act", "hidden_activation", "activation_function"),
    "norm": ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_eps", "norm_type"),
    "tied embeddings": ("tie_word_embeddings",),
    "position encoding": ("position_embedding_type", "alibi", "rotary", "rope_interleave"),
    "experts": ("num_experts", "num_local_experts", "n_routed_experts", "n_shared_experts",
                "num_experts_per_tok"),
    "model type": ("model_type",),
}  # fmt: skip
_STRUCTURE_KEYS = {key: part for part, keys in STRUCTURE.items() for key in keys}
# Bookkeeping that says nothing about the model.
_IGNORED = {"_name_or_path", "transformers_version", "torch_dtype", "dtype", "use_cache",
            "architectures", "auto_map", "name_or_path", "vocab_size"}  # fmt: skip
_SCALE_SUFFIXES = ("_scale", "_scale_inv", ".scales", ".qweight", ".qzeros", ".absmax", ".SCB",
                   ".quant_map", ".g_idx", ".weight_packed", ".weight_shape")  # fmt: skip
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", "vocab.txt")


def check_quantised(checkpoint: Checkpoint, found: Findings) -> None:
    """Refuse weights that are codes of a quantisation rather than numbers."""
    if checkpoint.config.get("quantization_config"):
        method = checkpoint.config["quantization_config"]
        name = method.get("quant_method", "unknown") if isinstance(method, dict) else "unknown"
        found.problem(
            f"{checkpoint.id} is quantised ({str(name)[:40]}): its tensors are codes, not weights. "
            "Give the original checkpoint in bfloat16, float16 or float32."
        )
        return
    codes = [
        name
        for name, tensor in checkpoint.tensors.items()
        if tensor.spec.dtype.startswith("F8") or name.endswith(_SCALE_SUFFIXES)
    ]
    if codes:
        found.problem(
            f"{checkpoint.id} holds quantised tensors ({listed(codes, limit=2)}). "
            "Give the original checkpoint in bfloat16, float16 or float32."
        )


def check_configs(base: Checkpoint, expert: Checkpoint, found: Findings) -> None:
    """Compare two configs: structure must agree, other differences are named."""
    for key, (left, right) in sorted(_differences(base.config, expert.config).items()):
        leaf = key.rsplit(".", 1)[-1]
        part = _STRUCTURE_KEYS.get(leaf)
        shown_key = key if len(key) <= 120 else f"{key[:117]}..."
        text = f"{shown_key} is {shown(right)} in {expert.id} and {shown(left)} in {base.id}"
        if part is None or left is _MISSING or right is _MISSING:
            found.warning(f"config: {text}; the base's is kept")
        else:
            found.problem(
                f"{text} ({part}). These are not weights of one base; give experts that were "
                "trained from it."
            )


def check_small_files(base: Checkpoint, tokenizer: Checkpoint, found: Findings) -> None:
    """Warn of files that a model is loaded with and that will be missing from the output."""
    if not any(name in tokenizer.small_files for name in _TOKENIZER_FILES):
        found.warning(
            f"{tokenizer.id} has no tokenizer files, so the output will have none",
            Remedy.TOKENIZER_FROM,
        )
    if "generation_config.json" not in base.small_files:
        found.warning(f"{base.id} has no generation_config.json; none will be written")


def check_tokenizers(base: Checkpoint, expert: Checkpoint, found: Findings) -> None:
    """Warn where an expert's tokenizer files differ from the base's."""
    different = [
        name
        for name in _TOKENIZER_FILES
        if name in base.small_files
        and name in expert.small_files
        and not _same_small_file(base, expert, name)
    ]
    if different:
        found.warning(
            f"{expert.id} has another {' and '.join(different)} than the base, whose tokenizer is "
            "kept; the expert may rely on its own",
            Remedy.TOKENIZER_FROM,
        )


def _same_small_file(base: Checkpoint, expert: Checkpoint, name: str) -> bool:
    known = base.small_oid(name)
    if known is not None and known == expert.small_oid(name):
        return True
    return base.read_small(name) == expert.read_small(name)


@dataclass(frozen=True, slots=True)
class TensorSets:
    """Which tensors of the base go which way.

    Attributes:
        merged: names that the base and all experts have, floating point.
        carried: names that no expert has, or that hold no floats: the base's bytes are kept.
        left_out: names that are not written, with the reason.
    """

    merged: tuple[str, ...]
    carried: Mapping[str, str]
    left_out: Mapping[str, str]


def match_tensors(base: Checkpoint, experts: Sequence[Checkpoint], found: Findings) -> TensorSets:
    """Decide for every tensor: merged, carried or left out; what fits nothing is refused."""
    merged: list[str] = []
    carried: dict[str, str] = {}
    left_out = _tied_heads(base, experts, found)
    partial: dict[str, list[str]] = {}
    shapes: dict[str, list[str]] = {}
    for name, stored in base.tensors.items():
        if name in left_out:
            continue
        having = [expert for expert in experts if name in expert.tensors]
        if not having:
            carried[name] = "no expert has it"
        elif len(having) < len(experts):
            lacking = [expert.id for expert in experts if name not in expert.tensors]
            partial.setdefault(listed(lacking), []).append(name)
        elif not DTYPES[stored.spec.dtype].is_merged:
            carried[name] = f"it holds {stored.spec.dtype}, not floating point"
        else:
            merged.append(name)
            _check_shapes(stored, having, shapes)
    for expert in experts:
        for name in expert.tensors:
            if name not in base.tensors and name not in left_out:
                left_out[name] = f"the base lacks it (seen in {expert.id})"
    for experts_without, names in partial.items():
        found.problem(
            f"{len(names)} tensor(s) are in the base and some experts but not in "
            f"{experts_without}: {listed(names)}. Give complete checkpoints of one architecture."
        )
    for problem, names in shapes.items():
        found.problem(f"{listed(names)} {problem}")
    for reason, names in _grouped(carried).items():
        found.warning(
            f"{len(names)} tensor(s) kept as in the base, {reason}: {listed(names)}",
            kind=KEPT_AS_IN_BASE,
        )
    for reason, names in _grouped(left_out).items():
        found.warning(f"{len(names)} tensor(s) left out, {reason}: {listed(names)}", kind=LEFT_OUT)
    return TensorSets(tuple(merged), carried, left_out)


def _tied_heads(base: Checkpoint, experts: Sequence[Checkpoint], found: Findings) -> dict[str, str]:
    """Return the LM heads that a tied config makes redundant, after checking that they are."""
    heads = [
        name
        for checkpoint in (base, *experts)
        for name, stored in checkpoint.tensors.items()
        if role_of(name, stored.spec.shape) is Role.HEAD and name.endswith("lm_head.weight")
    ]
    head = heads[0] if heads else None
    tied = base.config.get("tie_word_embeddings", head is None or head not in base.tensors)
    if head is None or not tied:
        return {}
    embedding = _embedding_name(base)
    if embedding is None:
        return {}
    for checkpoint in (base, *experts):
        if head not in checkpoint.tensors or embedding not in checkpoint.tensors:
            continue
        if not _same_values(checkpoint, head, embedding):
            found.problem(
                f"{checkpoint.id} has its own {head}, but the base ties it to {embedding}: a tied "
                "model cannot hold it. Merge on an untied base, or drop that expert."
            )
    return {head: f"it is tied to {embedding} and equal to it"}


def _embedding_name(base: Checkpoint) -> str | None:
    names = [
        name
        for name, stored in base.tensors.items()
        if role_of(name, stored.spec.shape) is Role.EMBEDDING and "position" not in name
    ]
    return names[0] if names else None


def _same_values(checkpoint: Checkpoint, left: str, right: str) -> bool:
    a, b = checkpoint.tensors[left].spec, checkpoint.tensors[right].spec
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    rows, step = a.matrix_shape[0], 4096
    starts = range(0, rows, step)
    if checkpoint.is_remote:
        # A few rows from all over the table: reading both whole would take longer than a plan may.
        step = 32
        starts = range(0, rows, max(rows // 8, 1))
    return all(
        checkpoint.read(left, start, min(start + step, rows))
        == checkpoint.read(right, start, min(start + step, rows))
        for start in starts
    )


def _check_shapes(
    stored: StoredTensor, having: Sequence[Checkpoint], problems: dict[str, list[str]]
) -> None:
    """Add what does not fit to `problems`: the problem in words → the tensors that have it."""
    name, shape = stored.spec.name, stored.spec.shape
    for expert in having:
        other = expert.tensors[name].spec
        if not DTYPES[other.dtype].is_merged:
            problem = (
                f"hold {other.dtype} in {expert.id} and {stored.spec.dtype} in the base; only "
                "floating point can be merged."
            )
        elif other.shape == shape:
            continue
        elif role_of(name, shape) in (Role.EMBEDDING, Role.HEAD) and other.shape[1:] == shape[1:]:
            problem = (
                f"have {other.shape[0]} vocabulary rows in {expert.id} and {shape[0]} in the "
                "base: tokens were added or the table was padded. Resize the expert's embeddings "
                "to the base's (transformers: resize_token_embeddings) first."
            )
        else:
            problem = (
                f"have shape {list(other.shape)} in {expert.id} and {list(shape)} in the base. "
                "They must be of the same architecture."
            )
        problems.setdefault(problem, []).append(name)


class _Missing:
    def __repr__(self) -> str:
        return "not set"


_MISSING = _Missing()


def _differences(
    left: Mapping[str, Any], right: Mapping[str, Any], prefix: str = "", depth: int = 0
) -> dict[str, tuple[Any, Any]]:
    found: dict[str, tuple[Any, Any]] = {}
    for key in {*left, *right} - _IGNORED:
        a, b = left.get(key, _MISSING), right.get(key, _MISSING)
        if isinstance(a, dict) and isinstance(b, dict) and depth < 4:
            found |= _differences(a, b, f"{prefix}{key}.", depth + 1)
        elif a != b and not (a in (None, _MISSING) and b in (None, _MISSING)):
            found[f"{prefix}{key}"] = (a, b)
    return found


def _grouped(reasons: Mapping[str, str]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        groups.setdefault(reason, []).append(name)
    return groups
