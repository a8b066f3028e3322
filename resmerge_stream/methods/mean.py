"""The plain mean of the experts' task vectors, W0 + (1/N) Σ Δᵢ: a uniform model soup.

Wortsman et al. 2022, https://arxiv.org/abs/2203.05482 (uniform soup); the same weights as
mergekit's ``linear`` with normalisation. The baseline to beat.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..maths.lazy import TaskVectors
from .base import MergeMethod, Site, Update
from .parts.elementwise import cancelling, linear


@dataclass(frozen=True, kw_only=True)
class Mean(MergeMethod):
    """Every tensor is the base plus the (weighted) mean of the experts' differences to it."""

    name: ClassVar[str] = "mean"
    title: ClassVar[str] = "Mean"
    paper: ClassVar[str] = "Wortsman et al. 2022, Model soups"
    url: ClassVar[str] = "https://arxiv.org/abs/2203.05482"
    low_rank: ClassVar[bool] = True
    weighted: ClassVar[bool] = True

    def check_weights(self, weights: tuple[float, ...]) -> str | None:
        """Return a problem when the weights cancel: a mean divides by their sum."""
        return cancelling(weights, "take task_arithmetic")

    def merge(self, vectors: TaskVectors, site: Site) -> Update:
        """Return Σ wᵢ Δᵢ / Σ wᵢ."""
        total = sum(site.weights)
        return linear([weight / total for weight in site.weights], "mean")


METHOD = Mean
