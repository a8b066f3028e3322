"""Whether checkpoints may be merged: configs, names, shapes, tied heads, quantisation.

Every check returns problems (the merge is refused) or warnings (it goes on, and says so).
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import Findings, Notice, Remedy, listed, shown
from ..roles import OTHER_TOWER, Role, layer_of, role_of
from ..sources.adapter_config import is_stray
from ..sources.checkpoint import Checkpoint
from ..sources.quantised import Alike, dequantised, inspect, quantised_by
from ..sources.store import StoredTensor
from ..sources.tables import embedding_of, is_tied
from ..specs import DTYPES

# Kinds of warnings that the report says in numbers of its own.
KEPT_AS_IN_BASE, LEFT_OUT = "kept-as-in-base", "left-out"
DEQUANTISED, MATCHED, MISSING, BARELY = "dequantised", "matched", "missing", "barely-touched"
# docs/models.md, "A rounded expert is mostly its rounding".
_ROUNDED = (
    ". Rounding may have changed them more than its training did: if it was trained in a wider "
    "dtype, merge that"
)
# Kind of what a checkpoint's own files say of each other.
REMARK = "source-files"
# Kind of the problem that there is nothing to merge.
NOTHING_DIFFERS = "nothing-differs"
# Kind of the problem that an expert was not trained from the base.
UNRELATED = "unrelated"
# Kind of the warning that an expert changes nothing, or is another one's equal.
IDLE = "changes-nothing"
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
    "position encoding": ("position_embedding_type", "alibi", "rotary", "rope_interleave"),
    "experts": ("num_experts", "num_local_experts", "n_routed_experts", "n_shared_experts",
                "num_experts_per_tok"),
    "model type": ("model_type",),
}  # fmt: skip
_STRUCTURE_KEYS = {key: part for part, keys in STRUCTURE.items() for key in keys}
# Bookkeeping that says nothing about the model.
_IGNORED = {"_name_or_path", "transformers_version", "torch_dtype", "dtype", "use_cache",
            "architectures", "auto_map", "name_or_path", "vocab_size",
            "tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id"}  # fmt: skip


def readable(checkpoint: Checkpoint, found: Findings, *, is_expert: bool = False) -> Checkpoint:
    """Return a checkpoint with numbers where it stores codes of a quantisation.

    What is quantised is told by stored dtypes, by companions of the right shape, and by the config;
    names or a config alone decide nothing.
    """
    inside = [name for name in checkpoint.tensors if ".base_layer." in name]
    empty = [name for name, stored in checkpoint.tensors.items() if stored.spec.shape == (0,)]
    if inside:
        found.problem(
            f"{checkpoint.id} was saved with an adapter inside: {listed(inside, limit=2)}. Call "
            "PEFT's merge_and_unload() before save_pretrained, or give the adapter alone."
        )
        return checkpoint
    if empty:
        found.problem(
            f"{len(empty)} tensor(s) of {checkpoint.id} hold no values: {listed(empty, limit=2)}. "
            "DeepSpeed's ZeRO-3 saves them so when they are not gathered. Set "
            "stage3_gather_16bit_weights_on_model_save, or write the run's checkpoint with its "
            "zero_to_fp32.py."
        )
        return checkpoint
    codes = inspect(checkpoint)
    for problem in codes.problems:
        found.problem(f"{checkpoint.id} {problem}.")
    if codes.problems:
        return checkpoint
    if codes.sources:
        found.warning(
            f"{checkpoint.id} is quantised ({codes.in_words}): its values are read as float32, and "
            "the merge is stored unquantised" + (_ROUNDED if is_expert else ""),
            kind=DEQUANTISED,
        )
        return dequantised(checkpoint, codes)
    if quantised_by(checkpoint.config):
        found.warning(
            f"the config of {checkpoint.id} speaks of a quantisation, but its weights are plain "
            "numbers; the config is not believed"
        )
        return dequantised(checkpoint, codes)
    return checkpoint


def check_configs(base: Checkpoint, expert: Checkpoint, found: Findings) -> None:
    """Compare two configs: structure must agree, other differences are named."""
    ours, theirs = _one_rope(base.config, expert.config)
    if isinstance(ours.get("text_config"), dict) != isinstance(theirs.get("text_config"), dict):
        # A text model alone, and the same one inside a multimodal model.
        ours, theirs = text_part(ours), text_part(theirs)
    for key, (left, right) in sorted(_differences(ours, theirs).items()):
        leaf = key.rsplit(".", 1)[-1]
        part = _STRUCTURE_KEYS.get(leaf)
        shown_key = key if len(key) <= 120 else f"{key[:117]}..."
        text = f"{shown_key} is {shown(right)} in {expert.id} and {shown(left)} in {base.id}"
        if part is None or left is _MISSING or right is _MISSING:
            why = ", and the expert learned with other positions" if "rope" in key else ""
            found.warning(f"config: {text}; the base's is kept{why}")
        else:
            found.problem(
                f"{text} ({part}). These are not weights of one base; give experts that were "
                "trained from it."
            )


def _one_rope(*configs: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return configs that say the rotary positions alike, where transformers 4 and 5 wrote them."""
    if all("rope_parameters" in text_part(one) for one in configs):
        return list(configs)
    if not any("rope_parameters" in text_part(one) for one in configs):
        return list(configs)
    made: list[Mapping[str, Any]] = []
    for config in configs:
        inner = config.get("text_config")
        if isinstance(inner, dict):
            made.append({**config, "text_config": _with_rope_parameters(inner)})
        else:
            made.append(_with_rope_parameters(config))
    return made


def _with_rope_parameters(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a config that says its rotary positions as transformers 5 does."""
    old = ("rope_theta", "rope_scaling", "rope_local_base_freq", "partial_rotary_factor")
    rest = {key: value for key, value in config.items() if key not in old}
    if "rope_parameters" in config:
        return rest
    scaling = config.get("rope_scaling")
    said = dict(scaling) if isinstance(scaling, dict) else {}
    kind = said.pop("rope_type", None) or said.pop("type", None) or "default"
    said.pop("type", None)
    for key in ("rope_theta", "partial_rotary_factor"):
        if config.get(key) is not None:
            said[key] = config[key]
    rope = {"rope_type": kind, **said}
    if (local := config.get("rope_local_base_freq")) is not None:
        rope = {
            "full_attention": rope,
            "sliding_attention": {"rope_type": "default", "rope_theta": local},
        }
    return {**rest, "rope_parameters": rope}


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
    base: Checkpoint,
    experts: Sequence[Checkpoint],
    found: Findings,
    *,
    missing: str = "base",
    tied: Mapping[str, str] | None = None,
) -> TensorSets:
    """Decide for every tensor: merged, carried or left out; what fits nothing is refused.

    Args:
        base, experts: in one layout.
        found: gets what was found.
        missing: of a tensor that only some experts have: ``base`` (merged among those) or
            ``refuse``.
        tied: names that are another tensor's copies, with the reason: they are left out.
    """
    merged: dict[str, tuple[int, ...]] = {}
    carried: dict[str, str] = {}
    left_out = dict(tied or {})
    shapes: dict[Notice, list[str]] = {}
    for name, stored in base.tensors.items():
        if name in left_out:
            continue
        having = tuple(i for i, expert in enumerate(experts) if name in expert.tensors)
        if experts and not having:
            carried[name] = "no expert has it"
        elif isinstance(base.trees[name], Alike):
            carried[name] = "packed alike in every model"
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
    touched = sum(base.tensors[name].spec.nbytes for name in merged)
    kept = sum(base.tensors[name].spec.nbytes for name in carried)
    if not merged:
        found.problem(
            "no tensor of the base is in any expert: there is nothing to merge. Give experts that "
            "were trained from this base."
        )
    elif touched < kept:  # a merge in name only, which is said first
        text = (
            f"only {touched / (touched + kept):.0%} of the base's bytes are touched by any expert; "
            "the rest stays as it is"
        )
        found.warnings.insert(0, Notice(text, kind=BARELY))
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
    outside = _outside_body(base)
    for expert in experts:
        lacking = [name for name in (*merged, *carried) if name not in expert.tensors]
        required = [
            name
            for name in lacking
            if role_of(name, base.tensors[name].spec.shape) is not Role.BUFFER
            and _must_have(name, expert.config)
            and not (name in outside and not any(one in expert.tensors for one in outside))
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


# What a model of one config may have or lack: layers that predict ahead, and a pooler.
_OPTIONAL = re.compile(r"(^|[._])(mtp|nextn|eagle|pooler\.)", re.IGNORECASE)


def _outside_body(base: Checkpoint) -> set[str]:
    """Return the tensors beside the module that holds most of a model: its heads.

    An expert that has none of them is the body alone, as AutoModel saves it.
    """
    modules = Counter(name.partition(".")[0] for name in base.tensors)
    ((body, count),) = modules.most_common(1) or [("", 0)]
    embedding = embedding_of(base) or ""
    if 2 * count <= len(base.tensors) or not embedding.startswith(f"{body}."):
        return set()
    # Of the LM head a config says whether it is there.
    apart = {name for name in base.tensors if name.partition(".")[0] != body}
    return {name for name in apart if not name.endswith("lm_head.weight")}


def _must_have(name: str, config: Mapping[str, Any]) -> bool:
    """Return whether a model of such a config has a tensor: its layers, norms and embeddings."""
    if _OPTIONAL.search(name):
        return False
    if OTHER_TOWER.search(name):
        return any(OTHER_TOWER.search(key) and isinstance(config[key], dict) for key in config)
    if name.endswith("lm_head.weight"):
        return is_tied(config) is False
    layer = layer_of(name)
    count = text_part(config).get("num_hidden_layers")
    return layer is None or type(count) is not int or layer < count


def check_different(layout: Checkpoint, experts: Sequence[Checkpoint], found: Findings) -> None:
    """Refuse a merge in which every expert is the base itself, or has the Hub's hashes of it.

    Copies among folders are named; whether they differ at all is told before the merge, by values.
    """
    base = _place(layout)
    if experts and base is not None and all(_place(expert) == base for expert in experts):
        found.problem(
            f"every expert has the weight files of {layout.id}: nothing differs, so there is "
            "nothing to merge.",
            Remedy.TRAINED_EXPERTS,
            kind=NOTHING_DIFFERS,
        )
        return
    known = [(layout, _contents(layout))]
    for expert in experts:
        own = _contents(expert)
        twin = next((other for other, there in known if own is not None and own == there), None)
        if twin is layout:
            found.warning(
                f"{expert.id} has the weight files of {layout.id}: it changes nothing, and still "
                "counts as one of the experts",
                Remedy.TRAINED_EXPERTS,
                kind=IDLE,
            )
        elif twin is not None and twin.id != expert.id:
            found.warning(
                f"{expert.id} has the weight files of {twin.id}: it counts twice", kind=IDLE
            )
        known.append((expert, own))


def _place(checkpoint: Checkpoint) -> object:
    """Return where a folder lies, and of a repository what tells its contents."""
    folder = checkpoint.folder
    return _contents(checkpoint) if folder is None else Path(folder).resolve()


def _contents(checkpoint: Checkpoint) -> object:
    """Return what tells weight files' contents apart without reading them; None if unknown."""
    hashes = sorted((file.sha256 or "", file.size) for file in checkpoint.files)
    if all(known for known, _ in hashes):
        config = checkpoint.opened.config
        return hashes, str(config) if "peft_type" in config else ""
    return None if checkpoint.folder is None else Path(checkpoint.folder).resolve()


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
