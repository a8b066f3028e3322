"""DARE + TIES: drop entries at random and rescale, then elect signs and merge what agrees.

Yu et al. 2024, https://arxiv.org/abs/2311.03099, with density 0.2 (the ResMerge paper's baseline;
it does not say which code). Public code differs: mergekit ``dare_ties`` does not trim by magnitude,
matches the L1 norm (``rescale: l1``) and adds (``reduce: sum``); yule-BUAA/MergeLM divides by the
density and trims again by magnitude (``trim: tensor``, its mask rate 0.8 is keep 0.2).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ..specs import TensorSpec
from .base import MergeMethod, Rule, Site, Update, default_role, param
from .parts.dare import RESCALES, dropper
from .parts.election import disjoint_merge
from .parts.elementwise import cancelling
from .parts.trimming import keep, tensor_thresholds

if TYPE_CHECKING:
    from torch import Tensor

    from ..maths.task_vectors import TaskVectors


@dataclass(frozen=True, kw_only=True)
class DareTies(MergeMethod):
    """Each expert keeps a random share of its changes, enlarged to make up for the rest; every
    weight then takes the mean of those that have the sign with more total weight."""

    name: ClassVar[str] = "dare_ties"
    title: ClassVar[str] = "DARE + TIES"
    paper: ClassVar[str] = "Yu et al. 2024, DARE"
    url: ClassVar[str] = "https://arxiv.org/abs/2311.03099"
    weighted: ClassVar[bool] = True

    density: float = param(0.2, "Share of entries to keep", minimum=0.0, maximum=1.0)
    rescale: str = param("inverse", "How kept entries grow", choices=RESCALES)
    trim: str = param("none", "Trim by magnitude too (MergeLM)", choices=("none", "tensor"))
    reduce: str = param("mean", "Average or add what agrees", choices=("mean", "sum"))
    scale: float = param(1.0, "Factor λ of the result", minimum=-10.0, maximum=10.0)

    def check_weights(self, weights: tuple[float, ...]) -> str | None:
        """Return a problem when the weights cancel where their sum divides."""
        return cancelling(weights) if self.reduce == "mean" else None

    def rule_for(self, spec: TensorSpec, experts: int) -> Rule:
        """Return the one rule for every tensor."""
        in_pieces = self.rescale != "l1" and self.trim == "none"
        return Rule("dare_ties", default_role(spec), in_pieces=in_pieces)

    def merge(self, vectors: TaskVectors, site: Site) -> Update:
        """Drop, rescale, trim where asked, elect, merge."""
        dropped = dropper(vectors, site, density=self.density, rescale=self.rescale)
        thresholds = [0.0] * vectors.count
        if self.trim == "tensor":
            thresholds = tensor_thresholds(vectors, self.density, dropped)

        def rows(block: slice, stack: Tensor) -> Tensor:
            deltas = [
                keep(delta, tau)
                for delta, tau in zip(dropped(block, stack), thresholds, strict=True)
            ]
            return disjoint_merge(deltas, site.weights, reduce=self.reduce, scale=self.scale)

        return Update(rows, "dare_ties")


METHOD = DareTies
