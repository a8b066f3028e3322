"""What a recipe may say about a parameter: one value, a gradient over the layers, or by filter.

mergekit's language, with its meaning. A list of plain values is a gradient: numbers are
interpolated from the first layer to the last, words and switches change over in steps; tensors
outside the layers take the first value. A list of ``{filter, value}`` goes by the tensor's name:
the first entry whose filter is part of it counts, an entry without a filter fits all; `value` may
be a gradient.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from ..errors import RecipeError, shown

# How many values a setting may hold, and how long a filter may be.
MAX_VALUES = 1024
MAX_FILTER = 200
# The largest weight of a model, either way.
MAX_WEIGHT = 1e6
# Of a whole number: more than any parameter's.
_MOST_BITS = 64
_NUMBERED = re.compile(r"^(.*?)\.(\d+)(?:\.|$)")

Scalar = bool | int | float | str

_SWITCHES = {
    **dict.fromkeys(("true", "yes", "on", "t", "y", "1"), True),
    **dict.fromkeys(("false", "no", "off", "f", "n", "0"), False),
}


def number(value: object) -> float | None:
    """Return what a recipe means by a number: also as text (YAML reads ``1e-1`` so); else None."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        read = float(value)
    except (ValueError, OverflowError):
        return None
    return read if math.isfinite(read) else None


def whole_number(value: object) -> int | None:
    """Return what a recipe means by a whole number: ``8``, ``8.0``, ``"8"``; else None."""
    read = number(value)
    return None if read is None or read != int(read) else int(read)


def switch(value: object) -> bool | None:
    """Return what a recipe means by true or false: also ``yes``, ``1`` or ``1.0``; else None."""
    if isinstance(value, str):
        return _SWITCHES.get(value.strip().lower())
    return bool(value) if isinstance(value, int | float) and value in (0, 1) else None


def checked_weight(value: object) -> float:
    """Return a model's weight.

    Raises:
        RecipeError: it is no number, or as large as `MAX_WEIGHT`.
    """
    read = number(value)
    if read is None or abs(read) >= MAX_WEIGHT:
        raise RecipeError(f"a model's weight must be a number, not {shown(value)}.")
    return read


def check_setting(key: str, setting: object) -> None:
    """Check the form of a setting; its values are the method's business.

    Raises:
        RecipeError: it is neither a value, nor a gradient, nor a list of filters.
    """
    if _is_scalar(setting):
        return
    conditions: Any = [setting] if isinstance(setting, Mapping) else setting
    if not _is_list(conditions) or not conditions or len(conditions) > MAX_VALUES:
        raise RecipeError(
            f"the parameter {shown(key)} must be one value, a list of values from the first layer "
            f"to the last, or a list of '- filter: …, value: …', not {shown(setting)}."
        )
    if all(_is_scalar(value) for value in conditions):
        return
    for condition in conditions:
        if not isinstance(condition, Mapping) or "value" not in condition:
            raise RecipeError(
                f"an entry of {key} must be '- filter: …, value: …' like the others, "
                f"not {shown(condition)}."
            )
        unknown = [name for name in condition if name not in ("filter", "value")]
        if unknown:
            raise RecipeError(
                f"unknown key {shown(unknown[0])} beside a filter of {key}; "
                "there are 'filter' and 'value'."
            )
        pattern, value = condition.get("filter"), condition["value"]
        if pattern is not None and (not isinstance(pattern, str) or len(pattern) > MAX_FILTER):
            raise RecipeError(
                f"a filter of {shown(key)} must be part of a tensor's name, such as self_attn, "
                f"not {shown(pattern)}."
            )
        if _is_scalar(value):
            continue
        if not _is_list(value) or not value or not all(_is_scalar(item) for item in value):
            raise RecipeError(
                f"the value of a filter of {shown(key)} must be one value or a list of them, "
                f"not {shown(value)}."
            )


def evaluate(
    setting: Any, tensor: str, t: float, convert: Callable[[Any], Scalar]
) -> Scalar | None:
    """Return the value that a setting has for a tensor, or None where no filter fits.

    Args:
        setting: of a form that `check_setting` passes.
        tensor: its name.
        t: how deep in the model it is, from 0 (also outside the layers) to 1.
        convert: checks a value and gives it its type.

    Raises:
        RecipeError: from `convert`.
    """
    if _is_scalar(setting):
        return convert(setting)
    conditions = [setting] if isinstance(setting, Mapping) else setting
    if _is_scalar(conditions[0]):
        return _at(conditions, t, convert)
    for condition in conditions:
        pattern = condition.get("filter")
        if pattern in (None, "*") or pattern in tensor:
            return evaluate(condition["value"], tensor, t, convert)
    return None


def _at(values: Sequence[Any], t: float, convert: Callable[[Any], Scalar]) -> Scalar:
    """Return a gradient's value at t."""
    found = [convert(value) for value in values]
    place = t * (len(found) - 1)
    low = int(place)
    first, second = found[low], found[min(low + 1, len(found) - 1)]
    if any(isinstance(value, bool | str) for value in found):
        return first
    mixed = (1 - (place - low)) * float(first) + (place - low) * float(second)
    # A whole number stays one: half a rank is none.
    return convert(round(mixed) if all(isinstance(value, int) for value in found) else mixed)


def is_plain(setting: object) -> bool:
    """Return whether a setting is one value, the same for all tensors."""
    return _is_scalar(setting)


def before(first: Any, second: Any) -> Any:
    """Return the setting that is `first` where that has a value, else `second`.

    Args:
        first: of a form that `check_setting` passes.
        second: likewise; or None, where nothing follows.
    """
    conditions = first if _is_list(first) else [first]
    if second is None or not isinstance(conditions[0], Mapping):
        return first
    if any(condition.get("filter") in (None, "*") for condition in conditions):
        return first
    rest = second if _is_list(second) else [second]
    if not isinstance(rest[0], Mapping):
        rest = [{"value": second}]
    return [*conditions, *rest]


def depths(names: Iterable[str]) -> dict[str, float]:
    """Return for each tensor how deep in its stack of layers it is, from 0 to 1.

    The first number in a name is that of its layer; tensors without one are at 0, those of a
    stack of one layer at 1, as in mergekit.
    """
    found = {name: match for name in names if (match := _NUMBERED.match(name))}
    last: dict[str, int] = {}
    for match in found.values():
        stack, number = match.group(1), int(match.group(2))
        last[stack] = max(last.get(stack, 0), number)
    return {
        name: int(match.group(2)) / last[match.group(1)] if last[match.group(1)] else 1.0
        for name, match in found.items()
    }


def _is_scalar(value: object) -> bool:
    # A hexadecimal number of thousands of digits is read as one, and can't be written again.
    if isinstance(value, int) and value.bit_length() > _MOST_BITS:
        return False
    return isinstance(value, bool | int | float | str)


def _is_list(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)
