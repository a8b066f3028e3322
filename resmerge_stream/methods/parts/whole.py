"""Whole weights instead of task vectors: sums of the models themselves, and their products.

Wᵢ = W0 + Δᵢ, so what mergekit computes of whole weights is a function of W0 and the Δᵢ, where W0 is
the model that gives the layout: the base, or the first model. Not a method itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from ...maths.lazy import TaskVectors, Tensor, passes
from ..base import OfSum, Update
from .elementwise import linear


def of_weights(
    vectors: TaskVectors,
    base: float | None,
    experts: Sequence[float],
    rule: str,
    gates: Mapping[str, Any] | None = None,
    warnings: tuple[str, ...] = (),
) -> Update:
    """Return the update to c₀ W0 + Σ cᵢ Wᵢ.

    Args:
        vectors: read again, for W0, where the coefficients don't add up to 1.
        base: c₀; None where all coefficients add up to 1.
        experts: cᵢ.
        rule: what the report calls it.
        gates, warnings: of the report.
    """
    excess = 0.0 if base is None else base + sum(experts) - 1.0

    if experts and not excess:
        return replace(linear(experts, rule, warnings), gates=gates or {})

    def rows(block: slice, stack: Tensor) -> Tensor:
        return passes.combined([*stack, vectors.base(block)], [*experts, excess])

    total = OfSum(tuple(experts), own=excess) if experts else None
    return Update(rows, rule, gates or {}, warnings, moves_base=excess != 0, of_sum=total)


def whole_gram(vectors: TaskVectors) -> Tensor:
    """Return ⟨Wᵢ, Wⱼ⟩ of the base and the experts, in this order: float64, shape (N + 1, N + 1)."""
    # As ⟨W0, W0⟩, ⟨W0, Δⱼ⟩ and ⟨Δᵢ, Δⱼ⟩: the small ones keep their digits.
    total = vectors.whole_gram()
    inner = total[0, 1:].clone()
    square = total[0, 0].clone()
    total[1:, 1:] += square + inner[:, None] + inner[None, :]
    total[0, 1:] += square
    total[1:, 0] += square
    return total
