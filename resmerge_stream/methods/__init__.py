"""The methods: every file of this folder that ends in ``METHOD = …``, found by name."""

import dataclasses
import difflib
import importlib
import math
import pkgutil
from collections.abc import Mapping
from typing import Any

from ..errors import RecipeError, listed, shown
from .base import MergeMethod, Rule, Site, Update, key_of

__all__ = ["RECOMMENDED", "MergeMethod", "Rule", "Site", "Update", "build_method", "find_methods"]

# What page and demo choose first, by the evidence of docs/quality.md. A recipe that names no method
# still means `resmerge`.
RECOMMENDED = "head_regression"


def find_methods() -> dict[str, type[MergeMethod]]:
    """Return every method by name, sorted.

    Raises:
        RuntimeError: a file is not called like its method.
    """
    found: dict[str, type[MergeMethod]] = {}
    for module in pkgutil.iter_modules(__path__):
        method = getattr(importlib.import_module(f"{__name__}.{module.name}"), "METHOD", None)
        if method is None:
            continue
        if method.name != module.name:
            raise RuntimeError(f"methods/{module.name}.py must be called {method.name}.py")
        found[method.name] = method
    return dict(sorted(found.items()))


def build_method(name: str, parameters: Mapping[str, Any]) -> MergeMethod:
    """Return a method with its parameters checked.

    Args:
        name: as in a recipe.
        parameters: by name; ``preset`` names settings of a paper, over which the others win. Text
            is converted, so that ``--set k=2`` works; a tuple is one number for each expert.

    Raises:
        RecipeError: no such method, no such parameter, or a value out of its range.
    """
    method = method_class(name)
    fields = parameter_fields(method)
    values: dict[str, Any] = {}
    for key, value in settled(method, parameters).items():
        field = fields[key]
        if isinstance(value, tuple) and field.metadata["each"]:
            values[field.name] = tuple(checked_value(key, item, field) for item in value)
        else:
            values[field.name] = checked_value(key, value, field)
    return method(**values)


def method_class(name: str) -> type[MergeMethod]:
    """Return a method by name.

    Raises:
        RecipeError: there is none of this name.
    """
    # A file is called like its method: the other files need not be imported, which takes time.
    if name in {module.name for module in pkgutil.iter_modules(__path__)}:
        method = getattr(importlib.import_module(f"{__name__}.{name}"), "METHOD", None)
        if method is not None:
            found: type[MergeMethod] = method
            return found
    raise RecipeError(_unknown("method", name, find_methods()))


def parameter_fields(method: type[MergeMethod]) -> dict[str, dataclasses.Field[Any]]:
    """Return a method's parameters by the names that recipes have for them."""
    return {key_of(item): item for item in dataclasses.fields(method)}


def settled(method: type[MergeMethod], parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Return parameters under today's names, a preset's among them.

    Args:
        method: whose they are.
        parameters: as a recipe has them, gradients and filters included.

    Raises:
        RecipeError: there is no such parameter, or no such preset.
    """
    fields = parameter_fields(method)
    values: dict[str, Any] = {}
    preset = parameters.get("preset")
    if preset is not None:
        if not isinstance(preset, str) or preset not in method.presets:
            raise RecipeError(_unknown(f"preset of {method.name}", str(preset), method.presets))
        values |= method.presets[preset]
    for key, value in parameters.items():
        if key in fields:
            values[key] = value
        elif key in method.aliases:
            alias = method.aliases[key]
            is_known = isinstance(value, str | bool | int) and value in alias.values
            values[alias.key] = alias.values[value] if is_known else value
        elif key != "preset":
            known = [*fields, *(["preset"] if method.presets else [])]
            raise RecipeError(_unknown(f"parameter of {method.name}", key, dict.fromkeys(known)))
    return values


# What mergekit 0.1.5 has too: here and there one name means one thing.
MERGEKITS = frozenset({
    "arcee_fusion", "breadcrumbs", "breadcrumbs_ties", "dare_linear", "dare_ties", "della",
    "della_linear", "karcher", "linear", "model_stock", "multislerp", "nearswap", "nuslerp",
    "passthrough", "ram", "ramplus_tl", "sce", "slerp", "task_arithmetic", "ties",
})  # fmt: skip
# Every parameter of its methods.
_MERGEKIT_KEYS = frozenset({
    "alpha", "density", "eps", "epsilon", "filter_wise", "gamma", "int8_mask", "lambda", "max_iter",
    "normalize", "normalize_weights", "nuslerp_flatten", "nuslerp_row_wise", "r", "rescale",
    "rescale_norm", "scale", "select_topk", "t", "tol", "weight",
})  # fmt: skip


def is_mergekits(method: str, key: str) -> bool:
    """Return whether mergekit's method of this name may be given a parameter."""
    return key in _MERGEKIT_KEYS and (method, key) != ("karcher", "scale")


def is_idle(method: type[MergeMethod], key: str, *, of_model: bool) -> bool:
    """Return whether a parameter of mergekit's says nothing to this one of its methods.

    mergekit reads what a method asks for and leaves the rest unread.

    Args:
        method: whose merge it is.
        key: the parameter.
        of_model: whether it is given for one model.
    """
    if method.name not in MERGEKITS or key not in _MERGEKIT_KEYS:
        return False
    if method.weighted and key == method.weight_key:
        return False
    fields = parameter_fields(method)
    if key in fields:
        return of_model and not fields[key].metadata["each"]
    return key not in method.aliases or of_model


def describe_methods() -> list[dict[str, Any]]:
    """Return every method with its parameters as plain data, for ``methods --json``."""
    return [
        {
            "name": method.name,
            "title": method.title,
            "paper": method.paper,
            "url": method.url,
            "weighted": method.weighted,
            "summary": (method.__doc__ or "").strip(),
            "base": method.base,
            "models": list(method.models),
            "presets": {name: dict(values) for name, values in method.presets.items()},
            "parameters": [
                {
                    "name": key_of(field),
                    "type": type(field.default).__name__,
                    "default": field.default,
                    "label": field.metadata["label"],
                    "minimum": field.metadata["minimum"],
                    "maximum": field.metadata["maximum"],
                    "choices": list(field.metadata["choices"]),
                    "each": field.metadata["each"],
                }
                for field in dataclasses.fields(method)
            ],
        }
        for method in find_methods().values()
    ]


def checked_value(key: str, value: Any, field: dataclasses.Field[Any]) -> Any:
    """Return a parameter's value with its type.

    Raises:
        RecipeError: it is of another type, or out of its range.
    """
    kind: type = type(field.default)
    meta = field.metadata
    if kind is str:
        spoken = {"true": True, "false": False}
        word = spoken.get(value.lower(), value) if isinstance(value, str) else value
        value = meta["words"].get(word, value) if isinstance(word, bool) else value
        if not isinstance(value, str) or (meta["choices"] and value not in meta["choices"]):
            raise RecipeError(
                f"{key} must be one of {listed(meta['choices'])}, not {shown(value)}."
            )
        return value
    if kind is bool:
        words = {"true": True, "false": False, "yes": True, "no": False}
        value = words.get(value.lower(), value) if isinstance(value, str) else value
        if not isinstance(value, bool):
            raise RecipeError(f"{key} must be true or false, not {shown(value)}.")
        return value
    number = _number(value)
    low, high = meta["minimum"], meta["maximum"]
    bounds = f" from {low:g} to {high:g}" if low is not None and high is not None else ""
    whole = "a whole number" if kind is int else "a number"
    if (
        number is None
        or (kind is int and number != int(number))
        or (low is not None and number < low)
        or (high is not None and number > high)
    ):
        raise RecipeError(f"{key} must be {whole}{bounds}, not {shown(value)}.")
    return kind(number)


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _unknown(what: str, name: str, known: Mapping[str, Any]) -> str:
    close = difflib.get_close_matches(name[:100], known, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return f"unknown {what} {name[:100]!r}.{hint} There are: {', '.join(sorted(known)) or 'none'}."
