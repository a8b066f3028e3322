"""The methods by name: a file here ends in ``METHOD = …``, or for a family in ``METHODS = (…)``."""

import dataclasses
import difflib
import importlib
import pkgutil
from collections.abc import Mapping
from typing import Any

from ..errors import RecipeError, listed, shown
from .base import MergeMethod, Rule, Site, Update, key_of
from .settings import before, number, switch

__all__ = ["MergeMethod", "Rule", "Site", "Update", "build_method", "find_methods"]

# Files of several methods.
FAMILIES = ("sparse",)


def find_methods() -> dict[str, type[MergeMethod]]:
    """Return every method by name, sorted.

    Raises:
        RuntimeError: a file is not called like its method.
    """
    found: dict[str, type[MergeMethod]] = {}
    for module in pkgutil.iter_modules(__path__):
        methods = _methods_in(module.name)
        if module.name not in (*FAMILIES, *methods) and methods:
            raise RuntimeError(f"methods/{module.name}.py must be called {next(iter(methods))}.py")
        found |= methods
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
    # Most files are called like their method: the others need not be imported, which takes time.
    is_file = name in {module.name for module in pkgutil.iter_modules(__path__)}
    for module in [name] if is_file else FAMILIES:
        if (method := _methods_in(module).get(name)) is not None:
            return method
    raise RecipeError(_unknown("method", name, find_methods()))


def _methods_in(module: str) -> dict[str, type[MergeMethod]]:
    """Return the methods of a file by name."""
    file = importlib.import_module(f"{__name__}.{module}")
    single = getattr(file, "METHOD", None)
    return {one.name: one for one in getattr(file, "METHODS", (single,)) if one is not None}


def parameter_fields(method: type[MergeMethod]) -> dict[str, dataclasses.Field[Any]]:
    """Return a method's parameters by the names that recipes have for them."""
    return {key_of(item): item for item in dataclasses.fields(method)}


def settled(method: type[MergeMethod], parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Return parameters under today's names, a preset's among them.

    Args:
        method: whose they are.
        parameters: as a recipe has them, gradients and filters included; a preset's value counts
            where no filter fits.

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
            values[key] = before(value, values.get(key))
        elif key in method.aliases:
            alias = method.aliases[key]
            is_known = isinstance(value, str | bool | int) and value in alias.values
            today = alias.values[value] if is_known else value
            values[alias.key] = before(today, values.get(alias.key))
        elif key != "preset":
            known = [*fields, *(["preset"] if method.presets else [])]
            unknown = _unknown(f"parameter of {method.name}", key, dict.fromkeys(known))
            if having := [n for n, one in find_methods().items() if key in parameter_fields(one)]:
                unknown += f" Methods that have it: {', '.join(having)}."
            raise RecipeError(unknown)
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


def is_parameter(method: type[MergeMethod], key: object) -> bool:
    """Return whether a word is the name of a parameter: of a method, or of one of mergekit's."""
    own = {*parameter_fields(method), *method.aliases, method.weight_key, "preset"}
    return key in own or key in _MERGEKIT_KEYS


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
        value = meta["words"].get(switch(value), value)
        if isinstance(value, int) and str(value) in meta["choices"]:
            value = str(value)
        if not isinstance(value, str) or (meta["choices"] and value not in meta["choices"]):
            raise RecipeError(
                f"{key} must be one of {listed(meta['choices'])}, not {shown(value)}."
            )
        return value
    if kind is bool:
        read = switch(value)
        if read is None:
            raise RecipeError(f"{key} must be true or false, not {shown(value)}.")
        return read
    given = number(value)
    low, high = meta["minimum"], meta["maximum"]
    bounds = f" from {low:g} to {high:g}" if low is not None and high is not None else ""
    whole = "a whole number" if kind is int else "a number"
    if (
        given is None
        or (kind is int and given != int(given))
        or (low is not None and given < low)
        or (high is not None and given > high)
    ):
        raise RecipeError(f"{key} must be {whole}{bounds}, not {shown(value)}.")
    return kind(given)


def _unknown(what: str, name: str, known: Mapping[str, Any]) -> str:
    close = difflib.get_close_matches(name[:100].lower(), known, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return f"unknown {what} {name[:100]!r}.{hint} There are: {', '.join(sorted(known)) or 'none'}."
