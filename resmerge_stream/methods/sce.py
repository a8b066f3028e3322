"""SCE: select what varies most, weigh experts by their energy, erase minority signs.

Wan et al. 2024 (FuseChat), https://arxiv.org/abs/2408.07990; name, parameter and formula are
mergekit's ``sce`` (0.1.5). Of the entries whose variance over the experts is not zero the
⌊select_topk · number⌋ largest stay; expert i weighs its mean square there, divided by the sum (all
alike where the sum is below 1e-6); of each entry the changes are averaged that have the sign of
their sum. Entries equal to the threshold are all kept; mergekit cuts them in a sort's order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..maths.lazy import TaskVectors, Tensor, passes, torch
from .base import MergeMethod, Site, Update, param
from .parts.trimming import Tally, magnitude

_NO_ENERGY = 1e-6


@dataclass(frozen=True, kw_only=True)
class Sce(MergeMethod):
    """Entries on which the experts differ most take the mean of the changes with the majority's
    sign, where an expert counts by how much it changed."""

    name: ClassVar[str] = "sce"
    title: ClassVar[str] = "SCE"
    paper: ClassVar[str] = "Wan et al. 2024, FuseChat"
    url: ClassVar[str] = "https://arxiv.org/abs/2408.07990"
    in_pieces: ClassVar[bool] = False

    select_topk: float = param(1.0, "Share of varying entries to keep", minimum=0.0, maximum=1.0)

    def entry_seconds(self) -> float:
        """Return what was measured (docs/performance.md)."""
        return 4.0e-9

    def merge(self, vectors: TaskVectors, site: Site) -> Update:
        """Return Σ wᵢ Δᵢ / Σ wᵢ over the selected entries with the elected sign."""
        if self.select_topk < 1:
            threshold, energies = _selection(vectors, self.select_topk)
        else:
            threshold, energies = 0.0, vectors.gram().diagonal().tolist()
        squares = [energy / max(vectors.shape[0] * vectors.shape[1], 1) for energy in energies]
        total = sum(squares)
        weights = (
            [x / total for x in squares]
            if total >= _NO_ENERGY
            else [1 / len(squares)] * len(squares)
        )

        def rows(block: slice, stack: Tensor) -> Tensor:
            sign = stack.sum(0, dtype=torch.float64).float()
            sign = torch.ones_like(sign).copysign_(sign)
            merged, share = torch.zeros_like(sign), torch.zeros_like(sign)
            agreeing = torch.empty_like(sign)
            for delta, weight in zip(stack, weights, strict=True):
                torch.mul(delta, sign, out=agreeing).clamp_min_(0)
                merged.add_(agreeing, alpha=weight)
                share.add_(agreeing.sign_(), alpha=weight)
            del agreeing
            merged.div_(share.clamp_min_(_NO_ENERGY)).mul_(sign)
            if self.select_topk < 1:
                merged.mul_(passes.shrunk(variance(stack), threshold).sign_())
            return merged

        return Update(rows, "sce", {"energies": weights, "selection_threshold": threshold})


def variance(stack: Tensor) -> Tensor:
    """Return the variance over the experts, divided by N, of each entry."""
    centred = stack - stack.mean(0)
    return centred.square_().mean(0)


def _selection(vectors: TaskVectors, share: float) -> tuple[float, list[float]]:
    """Return the least variance that is selected, and Σ Δᵢ² over what is; in two readings.

    Variances are ranked by the bits of their float32 patterns, the upper 16 first (`trimming`);
    the second reading adds up the squares on the way.
    """
    upper, varying = Tally(1), 0
    for block in vectors.blocks():
        spread = variance(vectors.stack(block))
        varying += int(torch.count_nonzero(spread))
        upper.add([spread])
    count = int(varying * share)
    if count == 0:
        return float("inf"), [0.0] * vectors.count
    (top,), (rank,) = upper.find([count])
    lower = Tally(1, [top])
    above = [0.0] * vectors.count
    inside = torch.zeros(vectors.count, 1 << 16, dtype=torch.float64)
    for block in vectors.blocks():
        stack = vectors.stack(block)
        bits = variance(stack).view(torch.int32)
        lower.add([variance(stack)])
        higher, same = bits >> 16 > top, bits >> 16 == top
        slots = bits[same] & 0xFFFF
        for i, delta in enumerate(stack):
            above[i] += float(delta[higher].square().sum(dtype=torch.float64))
            squares = delta[same].double().square()
            inside[i] += torch.bincount(slots, weights=squares, minlength=1 << 16).cpu()
    (slot,), _ = lower.find([rank])
    energies = [x + float(found[slot:].sum()) for x, found in zip(above, inside, strict=True)]
    return magnitude((top << 16) + slot), energies


METHOD = Sce
