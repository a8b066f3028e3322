"""DARE, linear: drop entries of the task vectors at random, rescale the rest, add or average.

Yu et al. 2024, https://arxiv.org/abs/2311.03099; mergekit ``dare_linear``. Seeds come from the
tensor's name and the expert's position, so the result depends on nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ..specs import TensorSpec
from .base import MergeMethod, Rule, Site, Update, default_role, param
from .parts.dare import RESCALES, dropper
from .parts.elementwise import cancelling

if TYPE_CHECKING:
    from torch import Tensor

    from ..maths.task_vectors import TaskVectors


@dataclass(frozen=True, kw_only=True)
class DareLinear(MergeMethod):
    """Each expert keeps a random share of its changes, enlarged to make up for the rest; the
    results are added (or averaged)."""

    name: ClassVar[str] = "dare_linear"
    title: ClassVar[str] = "DARE"
    paper: ClassVar[str] = "Yu et al. 2024, DARE"
    url: ClassVar[str] = "https://arxiv.org/abs/2311.03099"
    weighted: ClassVar[bool] = True

    density: float = param(0.2, "Share of entries to keep", minimum=0.0, maximum=1.0)
    rescale: str = param("inverse", "How kept entries grow", choices=RESCALES)
    reduce: str = param("sum", "Add or average", choices=("sum", "mean"))
    scale: float = param(1.0, "Factor λ of the result", minimum=-10.0, maximum=10.0)

    def check_weights(self, weights: tuple[float, ...]) -> str | None:
        """Return a problem when the weights cancel where their sum divides."""
        return cancelling(weights) if self.reduce == "mean" else None

    def rule_for(self, spec: TensorSpec, experts: int) -> Rule:
        """Return the one rule for every tensor."""
        return Rule("dare_linear", default_role(spec), in_pieces=self.rescale != "l1")

    def merge(self, vectors: TaskVectors, site: Site) -> Update:
        """Drop, rescale, and add: λ Σ wᵢ Δ̂ᵢ, divided by Σ wᵢ for the mean."""
        dropped = dropper(vectors, site, density=self.density, rescale=self.rescale)
        total = sum(site.weights) if self.reduce == "mean" else 1.0
        factors = [self.scale * weight / total for weight in site.weights]

        def rows(block: slice, stack: Tensor) -> Tensor:
            deltas = dropped(block, stack)
            update = deltas[0].mul_(factors[0])
            for delta, factor in zip(deltas[1:], factors[1:], strict=True):
                update.add_(delta, alpha=factor)
            return update

        return Update(rows, "dare_linear")


METHOD = DareLinear
