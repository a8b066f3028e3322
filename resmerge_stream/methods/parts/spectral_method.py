"""What the methods share that decompose matrices and leave the rest to a simple rule."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ...maths.lazy import TaskVectors, Tensor
from ...specs import TensorSpec
from ..base import (
    OTHER_CHOICES,
    Combination,
    MergeMethod,
    Rule,
    Site,
    Update,
    default_role,
    is_matrix,
    param,
)
from .elementwise import other_rule


@dataclass(frozen=True, kw_only=True)
class SpectralMethod(MergeMethod):
    """A method that decomposes matrices; embeddings, LM head and vectors follow `other`."""

    other: str = param("mean", "Rule of tensors without SVD", choices=OTHER_CHOICES)

    def rule_for(self, spec: TensorSpec, experts: int) -> Rule:
        """Return the method's own rule for matrices and stacks of them, else `other`."""
        role = default_role(spec)
        if is_matrix(spec, role):
            return Rule(self.name, role, needs_matrix=True)
        return Rule(self.other, role)

    def merge(self, vectors: TaskVectors, site: Site) -> Update:
        """Merge a matrix by its decomposition, anything else by `other`."""
        if not site.rule.needs_matrix:
            return other_rule(site)
        return self.merge_spectrum(vectors, site)

    @abstractmethod
    def merge_spectrum(self, vectors: TaskVectors, site: Site) -> Update:
        """Merge one matrix that is not zero in all experts."""


def product(
    left: Tensor, right: Tensor, rule: str, gates: Mapping[str, Any] | None = None
) -> Update:
    """Return the update ΔW = L·Rᵀ.

    Args:
        left: L, shape (m, K), float32.
        right: R, shape (n, K), float32.
        rule: what the report calls it.
        gates: what the report keeps.
    """
    transposed = right.T.contiguous()

    def rows(block: slice, stack: Tensor) -> Tensor:
        return left[block] @ transposed

    return Update(rows, rule, gates or {}, combination=Combination((), left, right))
