"""Linear rules shared by all methods: mean, sum and base of task vectors. Not a method itself."""

from __future__ import annotations

from collections.abc import Sequence

from ...maths.lazy import Tensor
from ..base import Combination, OfSum, Site, Update


def linear(coefficients: Sequence[float], rule: str, warnings: tuple[str, ...] = ()) -> Update:
    """Return the update ΔW = Σ aᵢ Δᵢ (paper Eq. 4 with all aᵢ = λ).

    Args:
        coefficients: a, one an expert.
        rule: what the report calls it.
    """
    total = OfSum(tuple(coefficients))
    exact = Combination(total.coefficients)
    return Update(total.rows, rule, warnings=warnings, combination=exact, of_sum=total)


def with_product(combination: Combination) -> OfSum:
    """Return Σ aᵢ Δᵢ + L·Rᵀ; the product is added in the dtype of L and R."""
    left, right = combination.left, combination.right
    if left is None or right is None:
        return OfSum(combination.coefficients)
    columns = right.T.contiguous()

    def finish(block: slice, total: Tensor) -> Tensor:
        return total.to(left.dtype).addmm_(left[block], columns).float()

    return OfSum(combination.coefficients, finish)


def cancelling(weights: Sequence[float], instead: str) -> str | None:
    """Return a problem when weights to divide by add up to (nearly) nothing.

    Args:
        weights: of all models.
        instead: what sums them without dividing.
    """
    if abs(sum(weights)) > 1e-6 * sum(map(abs, weights)):
        return None
    return (
        f"the weights {', '.join(f'{weight:g}' for weight in weights)} add up to zero, so there is "
        f"no weighted mean. For the weighted sum {instead}, or give other weights."
    )


def other_rule(site: Site) -> Update:
    """Return the update of a tensor that is not decomposed: rule ``mean``, ``sum`` or ``base``."""
    count = len(site.weights)
    coefficient = {"mean": 1.0 / count, "sum": 1.0, "base": 0.0}[site.rule.name]
    return linear([coefficient] * count, site.rule.name)
