"""TIES: trim small changes, elect a sign for every weight, average what agrees with it.

Yadav et al. 2023, https://arxiv.org/abs/2306.01708. Keep 20 % of the entries by magnitude (the
ResMerge paper's baseline, its A.2), then the elected sign and the disjoint mean. Public code
differs in what "20 %" is taken of: prateeky2806/ties-merging, fusion_bench and MergeBench rank the
whole model (``trim: model``, exact here by two counting passes), mergekit and MergeLLM each tensor
(``trim: tensor``). Entries equal to the threshold are all kept, as in the original; mergekit cuts
them in the order of a sort. fusion_bench adds instead of averaging (``reduce: sum``, scale 0.3).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from ..specs import TensorSpec
from .base import Counter, MergeMethod, Rule, Site, Update, default_role, param
from .parts.elementwise import cancelling

if TYPE_CHECKING:
    from torch import Tensor

    from ..maths.task_vectors import TaskVectors


@dataclass(frozen=True, kw_only=True)
class Ties(MergeMethod):
    """Of each expert's changes the largest are kept; every weight then takes the mean of those
    that have the sign with more total weight."""

    name: ClassVar[str] = "ties"
    title: ClassVar[str] = "TIES"
    paper: ClassVar[str] = "Yadav et al. 2023, TIES-Merging"
    url: ClassVar[str] = "https://arxiv.org/abs/2306.01708"
    weighted: ClassVar[bool] = True

    density: float = param(0.2, "Share of entries to keep", minimum=0.0, maximum=1.0)
    trim: str = param("model", "Rank entries in each tensor or all", choices=("model", "tensor"))
    reduce: str = param("mean", "Average or add what agrees", choices=("mean", "sum"))
    scale: float = param(1.0, "Factor λ of the result", minimum=-10.0, maximum=10.0)

    def check_weights(self, weights: tuple[float, ...]) -> str | None:
        """Return a problem when the weights cancel where their sum divides."""
        return cancelling(weights) if self.reduce == "mean" else None

    def rule_for(self, spec: TensorSpec, experts: int) -> Rule:
        """Return the one rule for every tensor."""
        return Rule("ties", default_role(spec), in_pieces=self.trim == "model")

    def counting_passes(self) -> int:
        """Return 2 for thresholds of the whole model."""
        return 2 if self.trim == "model" else 0

    def counter(self, number: int, counted: Mapping[str, Any], experts: int) -> Counter:
        """Return the counter of |Δ| over all tensors."""
        from .parts.trimming import ModelThresholds

        return ModelThresholds(number, counted, experts, self.density)

    def merge(self, vectors: TaskVectors, site: Site) -> Update:
        """Trim, elect, merge."""
        from .parts.election import disjoint_merge
        from .parts.trimming import keep, tensor_thresholds

        gates: dict[str, Any] = {}
        if self.trim == "model":
            thresholds = [site.counted["trim_thresholds"][i] for i in site.experts]
        else:
            thresholds = tensor_thresholds(vectors, self.density)
            gates = {"trim_thresholds": thresholds}

        def rows(block: slice, stack: Tensor) -> Tensor:
            trimmed = [keep(delta, tau) for delta, tau in zip(stack, thresholds, strict=True)]
            return disjoint_merge(trimmed, site.weights, reduce=self.reduce, scale=self.scale)

        return Update(rows, "ties", gates)


METHOD = Ties
