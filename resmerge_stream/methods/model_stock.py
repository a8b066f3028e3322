"""Model stock: between the base and the experts' mean, the nearer to the mean the more they agree.

Jang et al. 2024, https://arxiv.org/abs/2403.19522; name, parameter and formula are mergekit's
``model_stock`` (0.1.5): with c the mean cosine of the pairs of task vectors,
t = N·c / (1 + (N−1)·c) and ΔW = t · mean(Δ). Products of lengths below 1e-6 count as 1e-6, so
that tensors that hardly changed stay with the base. `filter_wise` has a cosine for each row; a
vector is one row.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import combinations
from typing import ClassVar

from ..maths.lazy import TaskVectors, Tensor, torch
from ..specs import TensorSpec
from .base import MergeMethod, Rule, Site, Update, default_role, param
from .parts.elementwise import linear

_NO_LENGTH = 1e-6
_SINGULAR = 1e-6


@dataclass(frozen=True, kw_only=True)
class ModelStock(MergeMethod):
    """The experts' mean change, shrunk by how little the experts agree on its direction."""

    name: ClassVar[str] = "model_stock"
    title: ClassVar[str] = "Model stock"
    paper: ClassVar[str] = "Jang et al. 2024, Model stock"
    url: ClassVar[str] = "https://arxiv.org/abs/2403.19522"
    models: ClassVar[tuple[int, int | None]] = (2, None)

    filter_wise: bool = param(False, "A cosine for each row instead of each tensor")

    def rule_for(self, spec: TensorSpec, experts: int) -> Rule:
        """Return the one rule; rows are on their own where each has its cosine."""
        in_pieces = self.filter_wise and len(spec.shape) > 1
        return Rule("model_stock", default_role(spec), in_pieces=in_pieces)

    def entry_seconds(self) -> float:
        """Return what was measured (docs/performance.md)."""
        return 0.7e-9

    def merge(self, vectors: TaskVectors, site: Site) -> Update:
        """Return t · mean(Δ)."""
        count = vectors.count
        if self.filter_wise and len(site.spec.shape) > 1:

            def rows(block: slice, stack: Tensor) -> Tensor:
                products = torch.einsum("ibn,jbn->bij", stack.double(), stack.double())
                lengths = products.diagonal(dim1=1, dim2=2).clamp_min(0).sqrt()
                cosine = mean_cosine(products, lengths, len(stack))
                return stack.mean(0).mul_(interpolation(cosine, len(stack)).float()[:, None])

            return Update(rows, "model_stock")
        gram = vectors.gram()
        lengths = gram.diagonal().clamp_min(0).sqrt()
        cosine = mean_cosine(gram, lengths, count)
        t = float(interpolation(cosine, count))
        gates = {"cosine": float(cosine), "share": t}
        return replace(linear([t / count] * count, "model_stock"), gates=gates)


def mean_cosine(products: Tensor, lengths: Tensor, count: int) -> Tensor:
    """Return the mean cosine of all pairs; leading axes are kept."""
    cosines = [
        (products[..., i, j] / (lengths[..., i] * lengths[..., j]).clamp_min(_NO_LENGTH)).clamp(
            -1.0, 1.0
        )
        for i, j in combinations(range(count), 2)
    ]
    return torch.stack(cosines).mean(0)


def interpolation(cosine: Tensor, count: int) -> Tensor:
    """Return t = N·c / (1 + (N−1)·c), 0 where that has no value."""
    denominator = 1 + (count - 1) * cosine
    singular = denominator.abs() < _SINGULAR
    t = count * cosine / torch.where(singular, 1.0, denominator)
    return torch.where(singular, 0.0, t)


METHOD = ModelStock
