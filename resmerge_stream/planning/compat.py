"""Whether checkpoints may be merged: configs, names, shapes, tied heads, quantisation.

Every check returns problems (the merge is refused) or warnings (it goes on, and says so).
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import Findings, Notice, Remedy, listed, shown
from ..roles import Role, layer_of, role_of
from ..sources.adapter_config import is_stray
from ..sources.checkpoint import Checkpoint, StoredTensor
from ..sources.quantised import dequantised, inspect
from ..specs import DTYPES

# Kinds of warnings that the report says in numbers of its own.
KEPT_AS_IN_BASE, LEFT_OUT = "kept-as-in-base", "left-out"
DEQUANTISED, MATCHED, MISSING, BARELY = "dequantised", "matched", "missing", "barely-touched"
# Kind of the problem that there is nothing to merge.
NOTHING_DIFFERS = "nothing-differs"
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
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", "vocab.txt")


def readable(checkpoint: Checkpoint, found: Findings) -> Checkpoint:
    """Return a checkpoint with numbers where it stores codes of a quantisation.

    What is quantised is told by stored dtypes, by companions of the right shape, and by the config;
    names or a config alone decide nothing.
    """
    codes = inspect(checkpoint)
    for problem in codes.problems:
        found.problem(f"{checkpoint.id} {problem}.")
    if codes.problems:
        return checkpoint
    if codes.sources:
        found.warning(
            f"{checkpoint.id} is quantised ({codes.in_words}): its values are read as float32, and "
            "the merge is stored unquantised",
            kind=DEQUANTISED,
        )
        return dequantised(checkpoint, codes)
    if checkpoint.config.get("quantization_config"):
        found.warning(
            f"the config of {checkpoint.id} speaks of a quantisation, but its weights are plain "
            "numbers; the config is not believed"
        )
        return dequantised(checkpoint, codes)
    return checkpoint


def check_configs(base: Checkpoint, expert: Checkpoint, found: Findings) -> None:
    """Compare two configs: structure must agree, other differences are named."""
    ours: Mapping[str, Any] = base.config
    theirs: Mapping[str, Any] = expert.config
    if isinstance(ours.get("text_config"), dict) != isinstance(theirs.get("text_config"), dict):
        # A text model alone, and the same one inside a multimodal model.
        ours, theirs = text_part(ours), text_part(theirs)
    for key, (left, right) in sorted(_differences(ours, theirs).items()):
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


def text_part(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the part of a config that describes the text model; all of it where it is alone."""
    inner = config.get("text_config")
    return inner if isinstance(inner, dict) else config


def check_stray_files(checkpoint: Checkpoint, found: Findings) -> None:
    """Warn of an adapter's config beside a whole model: which of them is meant is seen here."""
    names = [*checkpoint.small_files, *(file.name for file in checkpoint.files)]
    if "peft_type" not in checkpoint.config and is_stray(names):
        found.warning(
            f"{checkpoint.id} has an adapter_config.json without an adapter's weights; it is read "
            "as the whole model that lies beside it"
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
        merged: floating-point tensors of the base → which of the experts have them, from 0.
        carried: names that no expert has, or that hold no floats: the base's bytes are kept.
        left_out: names that are not written, with the reason.
    """

    merged: Mapping[str, tuple[int, ...]]
    carried: Mapping[str, str]
    left_out: Mapping[str, str]


def match_tensors(
    base: Checkpoint, experts: Sequence[Checkpoint], found: Findings, *, missing: str = "base"
) -> TensorSets:
    """Decide for every tensor: merged, carried or left out; what fits nothing is refused.

    Args:
        base, experts: in one layout.
        found: gets what was found.
        missing: of a tensor that only some experts have: ``base`` (merged among those) or
            ``refuse``.
    """
    merged: dict[str, tuple[int, ...]] = {}
    carried: dict[str, str] = {}
    left_out = _tied_heads(base, experts, found)
    shapes: dict[Notice, list[str]] = {}
    for name, stored in base.tensors.items():
        if name in left_out:
            continue
        having = tuple(i for i, expert in enumerate(experts) if name in expert.tensors)
        if experts and not having:
            carried[name] = "no expert has it"
        elif not DTYPES[stored.spec.dtype].is_merged:
            carried[name] = f"it holds {stored.spec.dtype}, not floating point"
        else:
            merged[name] = having
            _check_shapes(stored, [experts[i] for i in having], shapes)
    for expert in experts:
        for name in expert.tensors:
            if name not in base.tensors and name not in left_out:
                left_out[name] = f"the base lacks it (seen in {expert.id})"
    _report_missing(base, experts, merged, carried, found, refused=missing == "refuse")
    for problem, names in shapes.items():
        found.problem(f"{listed(names)} {problem.text}", *problem.remedies)
    for reason, names in _grouped(carried).items():
        found.warning(
            f"{len(names)} tensor(s) kept as in the base, {reason}: {listed(names)}",
            kind=KEPT_AS_IN_BASE,
        )
    for reason, names in _grouped(left_out).items():
        found.warning(f"{len(names)} tensor(s) left out, {reason}: {listed(names)}", kind=LEFT_OUT)
    _check_touched(base, merged, carried, found)
    return TensorSets(merged, carried, left_out)


def _report_missing(
    base: Checkpoint,
    experts: Sequence[Checkpoint],
    merged: Mapping[str, tuple[int, ...]],
    carried: Mapping[str, str],
    found: Findings,
    *,
    refused: bool,
) -> None:
    """Refuse experts that lack what their config says they have; list what they lack on purpose."""
    for expert in experts:
        lacking = [name for name in (*merged, *carried) if name not in expert.tensors]
        required = [
            name
            for name in lacking
            if role_of(name, base.tensors[name].spec.shape) is not Role.BUFFER
            and _must_have(name, expert.config)
        ]
        if required:
            found.problem(
                f"{len(required)} tensor(s) of the base are not in {expert.id}, whose config says "
                f"that it has them: {listed(required)}. Give a complete checkpoint of the base's "
                "architecture."
            )
        elsewhere = [name for name in lacking if name in merged and name not in required]
        if elsewhere and refused:
            found.problem(
                f"{len(elsewhere)} tensor(s) are not in {expert.id}: {listed(elsewhere)}. They "
                "can be merged among the experts that have them.",
                Remedy.MISSING_BASE,
            )
        elif elsewhere:
            found.warning(
                f"{len(elsewhere)} tensor(s) are merged without {expert.id}, which lacks them: "
                f"{listed(elsewhere)}",
                kind=MISSING,
            )


_OTHER_TOWER = re.compile(
    r"(^|\.)(vision|visual|image|audio|speech|vit|multi_modal|mm_)", re.IGNORECASE
)
_EXTRA_LAYERS = re.compile(r"(^|[._])(mtp|nextn|eagle)", re.IGNORECASE)


def _must_have(name: str, config: Mapping[str, Any]) -> bool:
    """Return whether a model of such a config has a tensor: its layers, norms and embeddings."""
    if _EXTRA_LAYERS.search(name):
        return False
    if _OTHER_TOWER.search(name):
        return any(_OTHER_TOWER.search(key) and isinstance(config[key], dict) for key in config)
    if name.endswith("lm_head.weight"):
        return text_part(config).get("tie_word_embeddings") is False
    layer = layer_of(name)
    count = text_part(config).get("num_hidden_layers")
    return layer is None or type(count) is not int or layer < count


def _check_touched(
    base: Checkpoint,
    merged: Mapping[str, tuple[int, ...]],
    carried: Mapping[str, str],
    found: Findings,
) -> None:
    """Say first where most of the base stays as it is: a merge in name only."""
    touched = sum(base.tensors[name].spec.nbytes for name in merged)
    kept = sum(base.tensors[name].spec.nbytes for name in carried)
    if not merged:
        found.problem(
            "no tensor of the base is in any expert: there is nothing to merge. Give experts that "
            "were trained from this base."
        )
    elif touched < kept:
        share = touched / (touched + kept)
        found.warnings.insert(
            0,
            Notice(
                f"only {share:.0%} of the base's bytes are touched by any expert; the rest stays "
                "as it is",
                kind=BARELY,
            ),
        )


def check_different(layout: Checkpoint, experts: Sequence[Checkpoint], found: Findings) -> None:
    """Refuse a merge in which every expert is the base itself, file by file."""
    files = _contents(layout)
    if experts and files is not None and all(_contents(expert) == files for expert in experts):
        found.problem(
            f"every expert has the weight files of {layout.id}: nothing differs, so there is "
            "nothing to merge.",
            Remedy.TRAINED_EXPERTS,
            kind=NOTHING_DIFFERS,
        )


def _contents(checkpoint: Checkpoint) -> object:
    """Return what tells weight files' contents apart without reading them; None if unknown."""
    if checkpoint.folder is not None:
        return Path(checkpoint.folder).resolve()
    hashes = sorted((file.sha256 or "", file.size) for file in checkpoint.files)
    return hashes if all(known for known, _ in hashes) else None


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
    if head in base.tensors and not _same_values(base, head, embedding):
        found.warning(
            f"the config of {base.id} ties {head} to {embedding}, but both are there with "
            "different values; each is merged on its own, as transformers loads them"
        )
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
    stored: StoredTensor, having: Sequence[Checkpoint], problems: dict[Notice, list[str]]
) -> None:
    """Add what does not fit to `problems`: the problem in words → the tensors that have it."""
    name, shape = stored.spec.name, stored.spec.shape
    for expert in having:
        other = expert.tensors[name].spec
        if not DTYPES[other.dtype].is_merged:
            problem = Notice(
                f"hold {other.dtype} in {expert.id} and {stored.spec.dtype} in the base; only "
                "floating point can be merged."
            )
        elif other.shape == shape:
            continue
        elif role_of(name, shape) in (Role.EMBEDDING, Role.HEAD) and other.shape[1:] == shape[1:]:
            problem = Notice(
                f"have {other.shape[0]} vocabulary rows in {expert.id} and {shape[0]} in the "
                "base: tokens were added or the table was padded. With tokenizer_source in "
                "the recipe rows are matched by token.",
                Remedy.MATCH_TOKENS,
            )
        else:
            problem = Notice(
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
