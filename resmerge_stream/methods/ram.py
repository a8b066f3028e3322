"""RAM: average what several experts changed, keep what one expert alone changed.

Yuan et al. 2026, merging RL-trained agentic models; public code xiangchi-yuan/mrl and mergekit
``ram``. An entry counts as changed where |Δ| > ε, ε = 1e-5 (mergekit's name and default, the
ResMerge paper's setting). ε is absolute: one bf16 step of a weight below 2⁻⁹ is smaller and is
dropped.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from ..maths.lazy import TaskVectors, Tensor, passes, torch
from .base import Alias, MergeMethod, Site, Update, param


@dataclass(frozen=True, kw_only=True)
class Ram(MergeMethod):
    """A weight that several experts changed takes the mean of their changes; one that a single
    expert changed takes that change whole."""

    name: ClassVar[str] = "ram"
    title: ClassVar[str] = "RAM"
    paper: ClassVar[str] = "Yuan et al. 2026, RAM"
    url: ClassVar[str] = "https://arxiv.org/abs/2601.13572"
    aliases: ClassVar[Mapping[str, Alias]] = {"threshold": Alias("epsilon")}

    epsilon: float = param(1e-5, "Smaller changes count as none", minimum=0.0, maximum=1.0)

    def entry_seconds(self) -> float:
        """Return what was measured (docs/performance.md)."""
        return 0.9e-9

    def merge(self, vectors: TaskVectors, site: Site) -> Update:
        """Return Σ mᵢ Δᵢ / max(Σ mᵢ, 1) with mᵢ = |Δᵢ| > ε."""

        def rows(block: slice, stack: Tensor) -> Tensor:
            return shared_mean(stack, self.epsilon, [1.0] * len(stack))

        return Update(rows, "ram")


def shared_mean(stack: Tensor, threshold: float, unique: list[float]) -> Tensor:
    """Return the mean of the changes of each entry, a lone change times its expert's factor.

    Args:
        stack: Δᵢ, shape (N, b, n).
        threshold: τ.
        unique: factors ρᵢ of entries that only expert i changed.
    """
    if (found := passes.shared_mean(stack, threshold, unique)) is not None:
        return found
    total = torch.zeros_like(stack[0])
    count = torch.zeros_like(stack[0])
    lone = torch.zeros_like(stack[0]) if any(factor != 1.0 for factor in unique) else None
    for delta, factor in zip(stack, unique, strict=True):
        # Comparisons are ten times slower than arithmetic in torch on a CPU.
        kept = torch.nn.functional.hardshrink(delta, threshold)
        total.add_(kept)
        changed = kept.sign_().abs_()
        count.add_(changed)
        if lone is not None:
            lone.add_(changed, alpha=factor - 1.0)
    if lone is not None:
        # Where one expert alone changed an entry, `lone` is that expert's factor less one.
        total.addcmul_(total * lone, (count == 1).float())
    return total.div_(count.clamp_min_(1.0))


METHOD = Ram
