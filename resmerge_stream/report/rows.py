"""A tensor's row of the report, put together while its pieces are written."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..maths.rounding import Kept
from ..methods import Rule, Update
from ..planning.plan import PlannedTensor
from .values import Groups, median, together


class Rows:
    """Makes the rows of a report from pieces that come in file order.

    Args:
        experts: N.
    """

    def __init__(self, experts: int) -> None:
        self._experts = experts
        self._open: _Row | None = None

    def carried(self, tensor: PlannedTensor, *, is_last: bool) -> dict[str, Any] | None:
        """Take a piece that was not merged; return the tensor's row after its last one."""
        if not is_last:
            return None
        spec = tensor.spec
        role = tensor.method.rule_for(spec, self._experts).role.value
        return tensor_row(
            name=spec.name, role=role, shape=list(spec.shape), rule="carried", changed_fraction=0.0
        )

    def merged(
        self,
        tensor: PlannedTensor,
        rule: Rule,
        update: Update,
        kept: Kept,
        remarks: Iterable[str],
        *,
        is_copy: bool,
        is_last: bool,
        unmoved: Iterable[int] = (),
        alike: Groups = (),
    ) -> dict[str, Any] | None:
        """Take a piece that was merged; return the tensor's row after its last one.

        Args:
            tensor, rule: as planned.
            update: what was decided.
            kept: what the cast kept.
            remarks: on how it was made.
            is_copy: whether no expert changed it.
            is_last: whether it is the tensor's last.
            unmoved: the experts that have changed nothing so far.
            alike: groups of experts that have changed the same so far.
        """
        row = self._open or _Row()
        row.unmoved = set(unmoved) if row.unmoved is None else row.unmoved & set(unmoved)
        row.alike = alike if row.alike is None else together(row.alike, alike)
        row.add(update, kept, remarks, is_copy=is_copy)
        self._open = None if is_last else row
        return row.finished(tensor, rule) if is_last else None


@dataclass(slots=True)
class _Row:
    """What is known of a tensor while its pieces come."""

    kept: Kept = field(default_factory=Kept)
    gates: list[dict[str, Any]] = field(default_factory=list)
    rules: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    unmoved: set[int] | None = None
    alike: Groups | None = None

    def add(self, update: Update, kept: Kept, remarks: Iterable[str], *, is_copy: bool) -> None:
        self.kept.absorb(kept)
        self.rules.append("copy" if is_copy else update.rule)
        for text in (*update.warnings, *remarks):
            if text not in self.warnings:
                self.warnings.append(text)
        if update.gates:
            self.gates.append(dict(update.gates))

    def finished(self, tensor: PlannedTensor, rule: Rule) -> dict[str, Any]:
        spec, gates = tensor.spec, dict[str, Any]()
        if tensor.parts > 1:
            gates["fused"] = list(tensor.fused.names if tensor.fused is not None else ())
        if len(self.gates) == 1 and len(self.rules) == 1:
            gates |= self.gates[0]
        elif self.gates:
            gates |= combine_slices(self.gates)
        if tensor.is_quantised:
            gates["scales"] = {spec.scales.name: list(spec.scales.shape)}
        if self.unmoved:
            gates["unmoved"] = sorted(self.unmoved)
        if self.alike:
            gates["alike"] = [list(group) for group in self.alike]
        applied = [name for name in self.rules if name != "copy"]
        return tensor_row(
            **gates,
            name=spec.name,
            role=rule.role.value,
            shape=list(spec.shape),
            dtype=spec.dtype,
            rule=Counter(applied).most_common(1)[0][0] if applied else "copy",
            update_norm=self.kept.update_norm,
            kept_norm=self.kept.kept_norm,
            kept_cosine=self.kept.kept_cosine,
            changed_fraction=self.kept.changed_fraction,
            warnings=self.warnings,
        )


# The keys of a tensor's row that design.md fixes; those without a meaning for a rule are null.
TENSOR_KEYS = (
    "name", "role", "shape", "rule", "rank", "sigma", "head_energy", "s_R", "c_R", "c_R_floor",
    "score", "beta", "alpha_R", "n_R", "norm_A", "S_H", "norm_C", "ret_H", "ret_R", "branch",
    "update_norm", "kept_norm", "kept_cosine", "changed_fraction", "solver", "warnings",
)  # fmt: skip


def tensor_row(**values: Any) -> dict[str, Any]:
    """Return a tensor's row: every fixed key, null where not given, NaN-free."""
    row: dict[str, Any] = dict.fromkeys(TENSOR_KEYS)
    row["warnings"] = []
    row.update(values)
    return {key: _plain(value) for key, value in row.items()}


def combine_slices(slices: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return one set of gates for a stack of matrices: medians, and the slices' own.

    Args:
        slices: the gates of each slice, in order.
    """
    combined: dict[str, Any] = {}
    keys = {key for gates in slices for key in gates}
    for key in sorted(keys):
        values = [gates.get(key) for gates in slices]
        numbers = [v for v in values if isinstance(v, int | float) and not isinstance(v, bool)]
        if numbers and len(numbers) == len(values):
            combined[key] = median(numbers)
        elif key == "branch":
            combined[key] = Counter(str(v) for v in values).most_common(1)[0][0]
    combined["slices"] = [dict(gates) for gates in slices]
    return combined


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return value
