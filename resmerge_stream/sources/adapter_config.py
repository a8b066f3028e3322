"""What ``adapter_config.json`` says of a LoRA adapter: its scale for each module, or why not.

PEFT's format and arithmetic (https://github.com/huggingface/peft). What cannot be merged is
refused here by name.
"""

import math
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import CheckpointFormatError, UnsupportedCheckpointError, shown
from .patterns import Patterns

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
_PICKLED = "adapter_model.bin"
_WHOLE = ("model.safetensors", "model.safetensors.index.json")

_MAX_RANK = 100_000
_MAX_PATTERNS = 20_000
_MAX_PATTERN = 500

# What changes the base's weights at the start of training, so that the adapter fits another base.
_MOVES_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
_VARIANTS = {
    "alora_invocation_tokens": "aLoRA, which is active for some tokens only",
    "use_qalora": "QALoRA, which belongs to a base quantised in groups",
    "use_bdlora": "BD-LoRA, whose factors are block-diagonal",
    "kasa_config": "KaSA, which also cuts the base's weights",
    "arrow_config": "Arrow, which routes between adapters",
    "monteclora_config": "MonteCLoRA, which samples its factors",
    "layer_replication": "an adapter of a base with repeated layers (layer_replication)",
}


@dataclass(frozen=True, slots=True)
class LoraSettings:
    """The settings of a LoRA adapter that decide what its factors mean.

    Attributes:
        rank: r where no pattern says otherwise.
        alpha: α, likewise.
        rank_pattern, alpha_pattern: by pattern of a module's name.
        rslora: whether the scale is α/√r rather than α/r.
        fan_in_fan_out: whether the base stores its weights transposed, as GPT-2 does.
        dora: whether magnitudes rescale the rows of the moved base.
        tokens: indices of trained tokens by module name; under an empty name: of the input
            embedding.
        target_parameters: parameters that are adapted themselves, by the end of their names.
        saved: modules whose weights the adapter says that it brings whole (``modules_to_save``).
        bias: which biases it says that it brings: ``none``, ``all`` or ``lora_only``.
        ties_embeddings: whether what changes the embedding changes the head alike.
        base: what the adapter says it was trained on.
        peft_version: the release that made it, three numbers; None where it isn't said.
    """

    rank: int
    alpha: float
    rank_pattern: Patterns[int]
    alpha_pattern: Patterns[float]
    rslora: bool
    fan_in_fan_out: bool
    dora: bool
    tokens: Mapping[str, tuple[int, ...]]
    target_parameters: frozenset[str]
    ties_embeddings: bool
    saved: tuple[str, ...]
    bias: str
    base: str | None
    peft_version: tuple[int, ...] | None

    def rank_of(self, module: str) -> int:
        """Return r of a module.

        Raises:
            ValueError: the patterns take too long to be matched.
        """
        return self.rank_pattern.get(module, self.rank)

    def scale_of(self, module: str) -> float:
        """Return s, the factor of B·A, of a module.

        Raises:
            ValueError: the patterns take too long to be matched.
        """
        alpha = self.alpha_pattern.get(module, self.alpha)
        rank = self.rank_of(module)
        return alpha / math.sqrt(rank) if self.rslora else alpha / rank


def is_adapter(names: list[str]) -> bool:
    """Return whether a folder or repository with these files is an adapter.

    A stray config of one, beside a whole model and without weights of its own, is none.
    """
    return CONFIG in names and not is_stray(names)


def is_stray(names: Collection[str]) -> bool:
    """Return whether an adapter's config lies beside a whole model, and its weights do not."""
    adapters = {WEIGHTS, _PICKLED} & set(names)
    return CONFIG in names and bool(set(_WHOLE) & set(names)) and not adapters


def check_adapter_files(where: str, names: list[str]) -> None:
    """Refuse an adapter whose weights cannot be read.

    Raises:
        CheckpointFormatError: a whole model lies beside it.
        UnsupportedCheckpointError: they are pickled, or not there.
    """
    whole = [name for name in names if name in _WHOLE]
    if whole:
        # transformers would load the adapter, and its base from elsewhere.
        raise CheckpointFormatError(
            f"{where!r} has a whole model ({whole[0]}) and a LoRA adapter ({CONFIG}), so it is not "
            "known which of them is meant. Give a folder that holds one of them."
        )
    if WEIGHTS in names:
        return
    if _PICKLED in names:
        raise UnsupportedCheckpointError(
            f"{where!r} has its adapter in {_PICKLED!r}, a pickle, which can run code when it is "
            "read. Convert it: PeftModel.from_pretrained(…).save_pretrained(…) writes safetensors."
        )
    raise UnsupportedCheckpointError(f"{where!r} has {CONFIG} but no {WEIGHTS}.")


def parse_settings(config: Mapping[str, Any], *, where: str) -> LoraSettings:
    """Return the settings of an adapter.

    Args:
        config: the parsed ``adapter_config.json``.
        where: what to call the adapter in errors.

    Raises:
        CheckpointFormatError: a value is not what PEFT would write.
        UnsupportedCheckpointError: the adapter is of a kind that cannot be merged.
    """
    kind = config.get("peft_type")
    if kind != "LORA":
        raise UnsupportedCheckpointError(
            f"{where!r} is an adapter of type {shown(kind)}; only LoRA adapters are merged. Merge "
            "it into its base with peft (merge_and_unload, save_pretrained), and give that model."
        )
    for key, what in _VARIANTS.items():
        if config.get(key):
            raise UnsupportedCheckpointError(
                f"{where!r} is {what}: it is not a fixed update of the base's weights. Merge it "
                "into its base with peft if peft can, and give that model."
            )
    start = str(config.get("init_lora_weights")).lower()
    if start.startswith(_MOVES_THE_BASE):
        raise UnsupportedCheckpointError(
            f"{where!r} was started with {start[:40]!r}, which changes the base's weights: its "
            "factors do not fit the published base. Convert it to LoRA with peft "
            "(save_pretrained with path_initial_model_for_weight_conversion)."
        )
    tokens = config.get("trainable_token_indices")
    tokens = {"": tokens} if isinstance(tokens, list) else tokens or {}
    if not isinstance(tokens, dict) or not all(
        isinstance(indices, list) and all(type(i) is int and i >= 0 for i in indices)
        for indices in tokens.values()
    ):
        raise CheckpointFormatError(
            f"{where!r}: trainable_token_indices must be a list of token numbers, or one a module."
        )
    value = config.get("peft_version")
    found = re.match(r"(\d{1,9})\.(\d{1,9})\.(\d{1,9})", value if isinstance(value, str) else "")
    return LoraSettings(
        rank=_rank(config.get("r", 8), "r", where),
        alpha=_number(config.get("lora_alpha", 8), "lora_alpha", where),
        rank_pattern=_patterns(config, "rank_pattern", _rank, where),
        alpha_pattern=_patterns(config, "alpha_pattern", _number, where),
        rslora=_switch(config, "use_rslora", where),
        fan_in_fan_out=_switch(config, "fan_in_fan_out", where),
        dora=_switch(config, "use_dora", where),
        tokens={module: tuple(indices) for module, indices in tokens.items()},
        target_parameters=frozenset(
            _texts(config.get("target_parameters"), "target_parameters", where)
        ),
        ties_embeddings=_switch(config, "ensure_weight_tying", where),
        saved=_texts(
            [saved] if isinstance(saved := config.get("modules_to_save"), str) else saved,
            "modules_to_save",
            where,
        ),
        bias=bias if isinstance(bias := config.get("bias"), str) else "none",
        base=base if isinstance(base := config.get("base_model_name_or_path"), str) else None,
        peft_version=tuple(map(int, found.groups())) if found else None,
    )


def _patterns(
    config: Mapping[str, Any], name: str, number: Callable[[object, str, str], Any], where: str
) -> Patterns[Any]:
    found = config.get(name) or {}
    if not isinstance(found, dict) or len(found) > _MAX_PATTERNS:
        raise CheckpointFormatError(
            f"{where!r}: {name} is not a mapping of module names to numbers."
        )
    for key in found:
        if len(key) > _MAX_PATTERN:
            raise CheckpointFormatError(
                f"{where!r}: {name} has a pattern of {len(key)} characters, {key[:80]!r}…; at most "
                f"{_MAX_PATTERN} are read."
            )
    try:
        return Patterns(
            {key: number(value, f"{name}[{key[:80]!r}]", where) for key, value in found.items()}
        )
    except ValueError as exc:
        if isinstance(exc, CheckpointFormatError):
            raise
        raise CheckpointFormatError(f"{where!r}: {name} has {exc}.") from exc


def _rank(value: object, name: str, where: str) -> int:
    if type(value) is not int or not 1 <= value <= _MAX_RANK:
        raise CheckpointFormatError(
            f"{where!r}: {name} must be a rank of 1 or more, not {shown(value)}."
        )
    return value


def _number(value: object, name: str, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e12:
        raise CheckpointFormatError(f"{where!r}: {name} must be a number, not {shown(value)}.")
    return float(value)


def _switch(config: Mapping[str, Any], name: str, where: str) -> bool:
    """Return a yes or no, which PEFT takes by its truth: 1 is yes, null is no."""
    value = config.get(name)
    if value is not None and not isinstance(value, bool | int | float):
        raise CheckpointFormatError(f"{where!r}: {name} must be true or false, not {shown(value)}.")
    return bool(value)


def _texts(value: object, name: str, where: str) -> tuple[str, ...]:
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise CheckpointFormatError(f"{where!r}: {name} must be a list of names.")
    return tuple(value)
