"""The plain mean of the experts' task vectors, W0 + (1/N) Σ Δᵢ: a uniform model soup.

Wortsman et al. 2022, https://arxiv.org/abs/2203.05482 (uniform soup); the same weights as
mergekit's ``linear`` with normalisation. The baseline to beat.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ..specs import TensorSpec
from .base import MergeMethod, Rule, Site, Update, default_role
from .parts.elementwise import cancelling, linear

if TYPE_CHECKING:
    from ..maths.task_vectors import TaskVectors


@dataclass(frozen=True, kw_only=True)
class Mean(MergeMethod):
    """Every tensor is the base plus the (weighted) mean of the experts' differences to it."""

    name: ClassVar[str] = "mean"
    title: ClassVar[str] = "Mean"
    paper: ClassVar[str] = "Wortsman et al. 2022, Model soups"
    url: ClassVar[str] = "https://arxiv.org/abs/2203.05482"
    low_rank: ClassVar[bool] = True
    weighted: ClassVar[bool] = True

    def rule_for(self, spec: TensorSpec, experts: int) -> Rule:
        """Return the mean rule for every tensor."""
        return Rule("mean", default_role(spec))

    def check_weights(self, weights: tuple[float, ...]) -> str | None:
        """Return a problem when the weights cancel: a mean divides by their sum."""
        return cancelling(weights)

    def merge(self, vectors: TaskVectors, site: Site) -> Update:
        """Return Σ wᵢ Δᵢ / Σ wᵢ."""
        total = sum(site.weights)
        return linear([weight / total for weight in site.weights], "mean")


METHOD = Mean
