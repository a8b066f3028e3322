"""LiNeS: scale another method's update linearly with the layer, shallow blocks least.

Wang et al. 2025, https://arxiv.org/abs/2410.17146; public code wang-kee/LiNeS. The update of block
l of L is multiplied by α + β·l/(L − 1); tensors outside the blocks by α. For merges of N experts
the paper sets α = (‖ΣΔᵢ‖₁ / ‖ΔW‖₁) / N with norms over the whole model (1/N for task arithmetic,
else one counting pass) and tunes β; automatic here is β = 1 − α, its rule for one model, so that
the last block keeps the whole update. (The ResMerge paper cites another work by this name.)
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from ..maths.lazy import TaskVectors, Tensor, torch
from ..roles import layer_of
from .base import Counter, Site, Update, param
from .parts.wrapped import Wrapped
from .sparse import TaskArithmetic


@dataclass(frozen=True, kw_only=True)
class Lines(Wrapped):
    """Another method's update, scaled by depth: the first blocks stay near the base, the last take
    the most."""

    name: ClassVar[str] = "lines"
    title: ClassVar[str] = "LiNeS (after another method)"
    paper: ClassVar[str] = "Wang et al. 2025, LiNeS: layer scaling"
    url: ClassVar[str] = "https://arxiv.org/abs/2410.17146"

    alpha: float = param(-1.0, "Scale of the first block; −1: automatic", minimum=-1.0, maximum=10)
    beta: float = param(-1.0, "Growth to the last block; −1: 1 − α", minimum=-1.0, maximum=10)

    def counting_passes(self) -> int:
        """Return one more than the inner method where α needs the model's L1 norms."""
        return self.wrapped.counting_passes() + (self.alpha < 0 and not self._is_plain_sum())

    def counter(self, number: int, counted: Mapping[str, Any], experts: int) -> Counter:
        """Return the inner method's counter, then that of the L1 norms."""
        if number < self.wrapped.counting_passes():
            return self.wrapped.counter(number, counted, experts)
        return _L1Norms(self, counted)

    def merge(self, vectors: TaskVectors, site: Site) -> Update:
        """Return the inner method's update times α + β·l/(L − 1)."""
        inner = self.wrapped.merge(vectors, self.inner_site(site))
        factor = self._factor(site)

        def rows(block: slice, stack: Tensor) -> Tensor:
            return inner.rows(block, stack) * factor

        # Rules by rows report nothing: their pieces would each carry the same number.
        gates = {**inner.gates, "layer_factor": factor} if site.rule.needs_matrix else inner.gates
        combination = inner.combination.scaled(factor) if inner.combination else None
        return Update(rows, "lines", gates, inner.warnings, combination)

    def _factor(self, site: Site) -> float:
        alpha = self.alpha
        if alpha < 0:
            update = 1.0 if self._is_plain_sum() else site.counted["lines_update_l1"]
            total = 1.0 if self._is_plain_sum() else site.counted["lines_sum_l1"]
            alpha = total / update / len(site.weights) if update > 0 else 0.0
        beta = self.beta if self.beta >= 0 else max(1.0 - alpha, 0.0)
        layer = layer_of(site.spec.name)
        if layer is None or site.layers < 2:
            return alpha
        return alpha + beta * layer / (site.layers - 1)

    def _is_plain_sum(self) -> bool:
        inner = self.wrapped
        return isinstance(inner, TaskArithmetic) and not inner.normalize and inner.lambda_ == 1


class _L1Norms:
    """Adds up ‖ΣΔᵢ‖₁ and the inner method's ‖ΔW‖₁."""

    def __init__(self, method: Lines, counted: Mapping[str, Any]) -> None:
        self._method, self._counted = method, counted
        self._sum: list[float] = []
        self._update: list[float] = []

    def add(self, vectors: TaskVectors, site: Site) -> None:
        """Merge a matrix, or some rows of one, by the inner method."""
        if vectors.is_zero():
            return
        inner = self._method.wrapped.merge(vectors, self._method.inner_site(site))
        for block in vectors.blocks():
            stack = vectors.stack(block)
            total = stack.sum(0)
            self._sum.append(float(total.abs().sum(dtype=torch.float64)))
            update = inner.rows(block, stack)
            self._update.append(float(update.abs().sum(dtype=torch.float64)))

    def result(self) -> dict[str, Any]:
        """Return the sums, rounded once: the order of `add` does not matter."""
        return {
            "lines_sum_l1": math.fsum(self._sum),
            "lines_update_l1": math.fsum(self._update),
        }


METHOD = Lines
