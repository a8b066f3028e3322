"""Numbers out of a report's rows."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..roles import Role, module_of


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
    if key in ("head_share", "above_floor", "update_rms"):
        return _derived(gates, key)
    return _number(gates.get(key))


def _derived(gates: Mapping[str, Any], key: str) -> float | None:
    if key == "update_rms":
        norm, size = _number(gates.get("update_norm")), math.prod(gates.get("shape") or ())
        return norm / math.sqrt(size) if norm is not None and size else None
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
