"""Task arithmetic: W0 + λ Σ wᵢ Δᵢ (paper Eq. 4), divided by Σ wᵢ where it is normalised.

Ilharco et al. 2023, https://arxiv.org/abs/2212.04089; mergekit ``task_arithmetic``. The ResMerge
paper's baseline is the sum with λ = 1 (its A.2); the authors' release means the mean by the same
word (docs/paper.md), preset ``release``. fusion_bench has λ = 0.3.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from ..specs import TensorSpec
from .base import Rule, default_role
from .parts.sparsified import Sparsified, lambda_param, normalize_param


@dataclass(frozen=True, kw_only=True)
class TaskArithmetic(Sparsified):
    """Every tensor is the base plus a scaled sum (or mean) of the experts' differences to it."""

    name: ClassVar[str] = "task_arithmetic"
    title: ClassVar[str] = "Task arithmetic"
    paper: ClassVar[str] = "Ilharco et al. 2023, Editing models with task arithmetic"
    url: ClassVar[str] = "https://arxiv.org/abs/2212.04089"
    low_rank: ClassVar[bool] = True
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": {"normalize": False, "lambda": 1.0},
        "release": {"normalize": True},
        "fusion_bench": {"normalize": False, "lambda": 0.3},
    }

    normalize: bool = normalize_param(False)
    lambda_: float = lambda_param()

    def rule_for(self, spec: TensorSpec, experts: int) -> Rule:
        """Return one rule for every tensor: ``sum`` or ``mean``."""
        return Rule("mean" if self.normalize else "sum", default_role(spec))


METHOD = TaskArithmetic
