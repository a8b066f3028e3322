"""Consensus merging: keep the weights that at least k experts use.

Wang et al. 2024, https://arxiv.org/abs/2405.07813; public code nik-dim/tall_masks. With τ = ΣΔᵢ,
expert i uses an entry where |Δᵢ| > λ|τ − Δᵢ| (its TALL mask); entries used by at least k = 2
experts keep λ_scale·τ. The paper tunes λ and the scale on validation data; data-free presets for λ
are 0.4 (IBM/STAR), 0.6 (fusion_bench) and 0.2 (MergeBench), for the scale 0.3 to 0.4.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..maths.lazy import TaskVectors, Tensor, passes, torch
from .base import MergeMethod, Site, Update, param


@dataclass(frozen=True, kw_only=True)
class Consensus(MergeMethod):
    """The sum of the experts' changes, kept only where enough experts matter to it."""

    name: ClassVar[str] = "consensus"
    title: ClassVar[str] = "Consensus TA"
    paper: ClassVar[str] = "Wang et al. 2024, Localizing task information (TALL masks)"
    url: ClassVar[str] = "https://arxiv.org/abs/2405.07813"

    mask_lambda: float = param(0.4, "How much an expert must matter", minimum=0.0, maximum=100.0)
    k: int = param(2, "Experts that must use an entry", minimum=0, maximum=64)
    scale: float = param(0.4, "Factor of the result", minimum=-10.0, maximum=10.0)

    def entry_seconds(self) -> float:
        """Return what was measured (docs/performance.md)."""
        return 1.0e-9

    def merge(self, vectors: TaskVectors, site: Site) -> Update:
        """Return scale · τ where at least k masks are set."""

        def rows(block: slice, stack: Tensor) -> Tensor:
            if (
                found := passes.shared_sum(stack, self.mask_lambda, self.k, self.scale)
            ) is not None:
                return found
            total = torch.zeros_like(stack[0], dtype=torch.float64)
            for delta in stack:
                total.add_(delta)
            users = torch.zeros_like(stack[0])
            for delta in stack:
                # The sign of |Δᵢ| − λ|τ − Δᵢ| stands for a comparison, ten times slower in torch.
                margin = (total - delta).abs_().mul_(-self.mask_lambda).add_(delta.abs())
                users.add_(margin.sign_().clamp_min_(0))
            enough = users.sub_(self.k - 1).clamp_(0, 1)
            return total.mul_(enough).float().mul_(self.scale)

        return Update(rows, "consensus")


METHOD = Consensus
