"""A report's tensors as rows that are safe to draw: whatever a stranger wrote, numbers and text."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from resmerge_stream.report.unusual import unusual
from resmerge_stream.report.values import family_rank, median, module_label, module_rank, value_of
from resmerge_stream.roles import Role, layer_of
from resmerge_stream.units import printable

NUMBERS = (
    "S_H", "above_floor", "alpha_R", "head_energy", "head_share", "c_R", "c_R_floor", "s_R",
    "update_rms", "changed_fraction", "kept_norm", "kept_cosine",
)  # fmt: skip
_ROLES = frozenset(role.value for role in Role)
_NAME = 160


@dataclass(frozen=True, slots=True)
class Row:
    """One tensor.

    Attributes:
        name: the parameter's, shortened.
        label: its module, such as ``q_proj``.
        layer: its block, or None outside of them.
        role: the family.
        rule: what was done.
        numbers: by key of `NUMBERS`, those that there are.
        unusual: what a reader should know about it.
    """

    name: str
    label: str
    layer: int | None
    role: str
    rule: str
    numbers: Mapping[str, float]
    unusual: tuple[str, ...]


def row_of(row: Mapping[str, Any]) -> Row:
    """Return the row of a tensor of a report that `parse_report` let through."""
    name = _text(row.get("name"))
    role = row.get("role")
    numbers = {}
    for key in NUMBERS:
        try:
            value = value_of(row, key)
        except (TypeError, ValueError, AttributeError, OverflowError):
            continue  # a stranger's report may hold anything where a number belongs
        if value is not None and abs(value) < 1e12:
            numbers[key] = value
    return Row(
        name,
        _text(module_label(name)),
        layer_of(name),
        role if isinstance(role, str) and role in _ROLES else Role.MATRIX.value,
        _text(row.get("rule")),
        numbers,
        tuple(_text(reason) for reason in unusual(row)[:5]),
    )


def _text(value: object) -> str:
    text = value if isinstance(value, str) else ""
    return printable(text[:_NAME])


def modules(rows: Iterable[Row], key: str) -> list[str]:
    """Return the modules that have some value of a key, family by family."""
    found: dict[str, str] = {}
    for row in rows:
        if key in row.numbers:
            found.setdefault(row.label, row.role)
    return sorted(found, key=lambda label: (family_rank(found[label]), module_rank(label), label))


def cells(rows: Iterable[Row], key: str) -> dict[tuple[str, int | None], float]:
    """Return the median of a key for each module and layer."""
    found: dict[tuple[str, int | None], list[float]] = {}
    for row in rows:
        if key in row.numbers:
            found.setdefault((row.label, row.layer), []).append(row.numbers[key])
    return {cell: median(values) for cell, values in found.items()}


def roles(rows: Iterable[Row]) -> list[str]:
    """Return the families that there are, in the order of a model's parts."""
    return sorted({row.role for row in rows}, key=family_rank)


def families(rows: Iterable[Row], key: str) -> dict[str, list[float]]:
    """Return the values of a key by family, in the order of a model's parts."""
    found: dict[str, list[float]] = {}
    for row in rows:
        if key in row.numbers:
            found.setdefault(row.role, []).append(row.numbers[key])
    return dict(sorted(found.items(), key=lambda item: family_rank(item[0])))
