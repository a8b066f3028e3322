"""A tensor's row of the report, put together while its pieces are written."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from .methods import Rule, Update
from .report import combine_slices, tensor_entry
from .rounding import Kept
from .specs import TensorSpec


@dataclass(slots=True)
class ReportRow:
    """What is known of a tensor while its pieces come."""

    kept: Kept = field(default_factory=Kept)
    gates: list[dict[str, Any]] = field(default_factory=list)
    rules: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def add(self, update: Update, kept: Kept, remarks: Iterable[str], *, is_zero: bool) -> None:
        """Note a piece: what was decided, what the cast kept, and whether no expert changed it."""
        self.kept.absorb(kept)
        self.rules.append("copy" if is_zero else update.rule)
        for text in (*update.warnings, *remarks):
            if text not in self.warnings:
                self.warnings.append(text)
        if update.gates:
            self.gates.append(dict(update.gates))

    def entry(self, spec: TensorSpec, rule: Rule) -> dict[str, Any]:
        """Return the finished row, as plain data."""
        gates: dict[str, Any] = {}
        if len(self.gates) == 1 and len(self.rules) == 1:
            gates = self.gates[0]
        elif self.gates:
            gates = combine_slices(self.gates)
        applied = [name for name in self.rules if name != "copy"]
        return tensor_entry(
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
