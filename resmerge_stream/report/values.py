"""Numbers out of a report's rows, and which experts have the same. Plain data, no torch."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..roles import Role, module_of

# Experts that have the same values, by number, in groups of at least two; nobody is in two of them.
Groups = tuple[tuple[int, ...], ...]


def groups_of(parts: Iterable[Iterable[int]]) -> Groups:
    """Return parts that have nobody in common as groups, in order; who is alone is in none."""
    every = (tuple(sorted(part)) for part in parts)
    return tuple(sorted(group for group in every if len(group) > 1))


def together(one: Groups, other: Groups) -> Groups:
    """Return the groups of those who are in one group both times."""
    where = {number: i for i, group in enumerate(other) for number in group}
    parts: dict[tuple[int, int], list[int]] = {}
    for i, group in enumerate(one):
        for number in group:
            if number in where:
                parts.setdefault((i, where[number]), []).append(number)
    return groups_of(parts.values())


def median(values: Sequence[float]) -> float:
    """Return the median of at least one number."""
    ordered = sorted(values)
    middle = len(ordered) // 2
    if len(ordered) % 2:
        return float(ordered[middle])
    return (ordered[middle - 1] + ordered[middle]) / 2


# The order of the forward pass; other modules come after, as the files name them.
_MODULE_ORDER = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_FAMILY_ORDER = {role.value: number for number, role in enumerate(Role)}


def value_of(row: Mapping[str, Any], key: str) -> float | None:
    """Return one number of a tensor's row, or None where it has none.

    Args:
        row: of a tensor in the report. A stack of matrices that has no value of its own gives the
            median of its slices'.
        key: a key of the report, or ``head_share`` (‖C‖/‖A‖), ``above_floor`` (c_R − 1/√N),
            ``update_rms``; ``head_energy`` is the mean over experts.
    """
    own = _own_value(row, key)
    if own is not None or not row.get("slices"):
        return own
    values = [v for part in row["slices"] if (v := _own_value(part, key)) is not None]
    return median(values) if values else None


def module_label(name: str) -> str:
    """Return the row of a tensor in tables and pictures: ``q_proj``, ``q_proj bias``."""
    return module_of(name) + (" bias" if name.endswith(".bias") else "")


def module_rank(label: str) -> int:
    """Return where a module stands among those of its family."""
    return _MODULE_ORDER.index(label) if label in _MODULE_ORDER else len(_MODULE_ORDER)


def family_rank(role: str | None) -> int:
    """Return where a family stands in the order of a model's parts."""
    return _FAMILY_ORDER.get(role or "", len(_FAMILY_ORDER))


def _own_value(gates: Mapping[str, Any], key: str) -> float | None:
    if key == "head_energy":
        energies = [v for item in gates.get(key) or () if (v := _number(item)) is not None]
        return sum(energies) / len(energies) if energies else None
    if key == "update_rms":
        norm, size = _number(gates.get("update_norm")), math.prod(gates.get("shape") or ())
        return norm / math.sqrt(size) if norm is not None and size else None
    if key not in ("head_share", "above_floor"):
        return _number(gates.get(key))
    names = ("norm_C", "norm_A") if key == "head_share" else ("c_R", "c_R_floor")
    left, right = (_number(gates.get(name)) for name in names)
    if left is None or right is None:
        return None
    if key == "above_floor":
        return left - right
    return left / right if right > 0 else None


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def has_values(rows: Iterable[Mapping[str, Any]], key: str) -> bool:
    """Return whether any tensor of a report has a number, such as a gate."""
    return any(value_of(row, key) is not None for row in rows)
