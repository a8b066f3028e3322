"""Linear: the weighted mean (or sum) of the models, the base among them if it has a weight.

Wortsman et al. 2022, https://arxiv.org/abs/2203.05482; name, parameters and defaults are mergekit's
``linear`` (0.1.5). It needs no base: Σ wᵢ Wᵢ / Σ wᵢ is the first model plus the weighted mean of
the differences to it. `mean` is the same for experts of one base that takes no part itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..maths.lazy import TaskVectors
from .base import MergeMethod, Site, Update, param
from .parts.elementwise import cancelling
from .parts.whole import of_weights


@dataclass(frozen=True, kw_only=True)
class Linear(MergeMethod):
    """Every weight is the weighted mean of the models' weights."""

    name: ClassVar[str] = "linear"
    title: ClassVar[str] = "Linear"
    paper: ClassVar[str] = "Wortsman et al. 2022, Model soups"
    url: ClassVar[str] = "https://arxiv.org/abs/2203.05482"
    low_rank: ClassVar[bool] = True
    weighted: ClassVar[bool] = True
    base: ClassVar[str] = "input"
    models: ClassVar[tuple[int, int | None]] = (0, None)

    normalize: bool = param(True, "Divide by the sum of the weights")

    def check_weights(self, weights: tuple[float, ...]) -> str | None:
        """Return a problem when the weights cancel where their sum divides."""
        return cancelling(weights, "set normalize: false") if self.normalize else None

    def keeps_low_rank(self, weights: tuple[float, ...], base_weight: float | None) -> bool:
        """Return whether the coefficients add up to 1, so that the base itself stays."""
        return self.normalize or abs((base_weight or 0.0) + sum(weights) - 1.0) < 1e-12

    def merge(self, vectors: TaskVectors, site: Site) -> Update:
        """Return Σ wᵢ Wᵢ, divided by Σ wᵢ for the mean, less W0."""
        base = site.base_weight or 0.0
        total = base + sum(site.weights) if self.normalize else 1.0
        return of_weights(
            vectors,
            # Exactly 1 for a mean, whatever rounding says of the sum.
            None if self.normalize else base / total,
            [weight / total for weight in site.weights],
            "linear",
        )


METHOD = Linear
