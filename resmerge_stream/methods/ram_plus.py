"""RAM+: RAM, with each expert's lone changes enlarged by how much of it is shared.

Yuan et al. 2026; public code xiangchi-yuan/mrl. With chᵢ the changed entries of expert i over the
whole model and ovᵢ those that another expert changed too, its lone changes are multiplied by
ρᵢ = 1 + (r − 1)·min(1, ratioᵢ). The versions differ in the ratio:

* ``arm-r-v2`` (the code's default): ovᵢ / (chᵢ − ovᵢ);
* ``arm-r``: ovᵢ / chᵢ;
* ``ramplus_tl`` (mergekit): ovᵢ / (chᵢ − ovᵢ) of each tensor by itself, cut at `alpha` instead of 1
  (its own preset is rescale 1.1, alpha 0.2).

The code divides by zero where every change of an expert is shared; here that ratio is the cut.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from ..maths.lazy import TaskVectors, Tensor, torch
from ..specs import TensorSpec
from .base import Counter, MergeMethod, Rule, Site, Update, default_role, param
from .ram import shared_mean

VARIANTS = ("arm-r-v2", "arm-r", "ramplus_tl")


@dataclass(frozen=True, kw_only=True)
class RamPlus(MergeMethod):
    """RAM, but changes that one expert alone made grow by up to `rescale`, the more of that
    expert's changes other experts share."""

    name: ClassVar[str] = "ram_plus"
    title: ClassVar[str] = "RAM+"
    paper: ClassVar[str] = "Yuan et al. 2026, RAM"
    url: ClassVar[str] = "https://github.com/xiangchi-yuan/mrl"

    threshold: float = param(1e-5, "Smaller changes count as none", minimum=0.0, maximum=1.0)
    rescale: float = param(1.05, "Largest factor r of lone changes", minimum=0.0, maximum=10.0)
    variant: str = param("arm-r-v2", "Which code's ratio", choices=VARIANTS)
    alpha: float = param(0.2, "Cut of the ratio in ramplus_tl", minimum=0.0, maximum=10.0)

    def rule_for(self, spec: TensorSpec, experts: int) -> Rule:
        """Return the one rule for every tensor."""
        return Rule("ram_plus", default_role(spec), in_pieces=self.variant != "ramplus_tl")

    def counting_passes(self) -> int:
        """Return 1 where the ratio is the whole model's."""
        return 0 if self.variant == "ramplus_tl" else 1

    def counter(self, number: int, counted: Mapping[str, Any], experts: int) -> Counter:
        """Return the counter of changed and shared entries."""
        return Overlap(experts, self.threshold)

    def merge(self, vectors: TaskVectors, site: Site) -> Update:
        """Return the shared mean, lone changes times ρᵢ."""
        gates: dict[str, Any] = {}
        if self.variant == "ramplus_tl":
            overlap = Overlap(vectors.count, self.threshold)
            overlap.count(vectors, range(vectors.count))
            factors = self._factors(overlap.result())
            gates = {"unique_factors": factors}
        else:
            of_all = self._factors(site.counted)
            factors = [of_all[i] for i in site.experts]

        def rows(block: slice, stack: Tensor) -> Tensor:
            return shared_mean(stack, self.threshold, factors)

        return Update(rows, "ram_plus", gates)

    def _factors(self, counted: Mapping[str, Sequence[int]]) -> list[float]:
        cut = self.alpha if self.variant == "ramplus_tl" else 1.0
        factors = []
        for changed, shared in zip(counted["ram_changed"], counted["ram_shared"], strict=True):
            whole = changed if self.variant == "arm-r" else changed - shared
            ratio = shared / whole if whole else (cut if changed else 0.0)
            factors.append(1.0 + (self.rescale - 1.0) * min(ratio, cut))
        return factors


class Overlap:
    """Counts changed entries and those that another expert changed too, for each expert."""

    def __init__(self, experts: int, threshold: float) -> None:
        self._threshold = threshold
        self._changed = [0] * experts
        self._shared = [0] * experts

    def add(self, vectors: TaskVectors, site: Site) -> None:
        """Count a matrix, or some rows of one."""
        self.count(vectors, site.experts)

    def count(self, vectors: TaskVectors, numbers: Sequence[int]) -> None:
        """Count for the experts of these numbers."""
        for block in vectors.blocks():
            changed = vectors.stack(block).abs() > self._threshold
            shared = changed & (changed.sum(0, dtype=torch.int32) >= 2)
            for i, mine, ours in zip(numbers, changed, shared, strict=True):
                self._changed[i] += int(mine.sum())
                self._shared[i] += int(ours.sum())

    def result(self) -> dict[str, Any]:
        """Return the counts."""
        return {"ram_changed": self._changed, "ram_shared": self._shared}


METHOD = RamPlus
