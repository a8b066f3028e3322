"""Task arithmetic: W0 + λ Σ wᵢ Δᵢ (paper Eq. 4), or λ times the mean of the Δᵢ.

Ilharco et al. 2023, https://arxiv.org/abs/2212.04089. The ResMerge paper's baseline is the sum
with λ = 1 (its A.2); the authors' release means the mean by the same word (docs/paper.md).
Public code: mergekit ``task_arithmetic`` (sum, weights given), fusion_bench (λ = 0.3).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ..specs import TensorSpec
from .base import MergeMethod, Rule, Site, Update, default_role, param
from .parts.elementwise import cancelling, linear

if TYPE_CHECKING:
    from ..maths.task_vectors import TaskVectors


@dataclass(frozen=True, kw_only=True)
class TaskArithmetic(MergeMethod):
    """Every tensor is the base plus a scaled sum (or mean) of the experts' differences to it."""

    name: ClassVar[str] = "task_arithmetic"
    title: ClassVar[str] = "Task arithmetic"
    paper: ClassVar[str] = "Ilharco et al. 2023, Editing models with task arithmetic"
    url: ClassVar[str] = "https://arxiv.org/abs/2212.04089"
    weighted: ClassVar[bool] = True

    reduce: str = param("sum", "Add the task vectors or average them", choices=("sum", "mean"))
    scale: float = param(1.0, "Factor λ of the result", minimum=-10.0, maximum=10.0)

    def rule_for(self, spec: TensorSpec, experts: int) -> Rule:
        """Return one rule for every tensor: ``sum`` or ``mean``."""
        return Rule(self.reduce, default_role(spec))

    def check_weights(self, weights: tuple[float, ...]) -> str | None:
        """Return a problem when a mean is asked for and the weights cancel."""
        return cancelling(weights) if self.reduce == "mean" else None

    def merge(self, vectors: TaskVectors, site: Site) -> Update:
        """Return λ Σ wᵢ Δᵢ, divided by Σ wᵢ for the mean."""
        total = sum(site.weights) if self.reduce == "mean" else 1.0
        factors = [self.scale * weight / total for weight in site.weights]
        return linear(factors, self.reduce)


METHOD = TaskArithmetic
