"""Sign election and disjoint merge (TIES), shared by the methods that end in it. Not a method.

Yadav et al. 2023, https://arxiv.org/abs/2306.01708, steps 2 and 3, with weights as in mergekit: the
sign that counts is that of the weighted change.
"""

from __future__ import annotations

from collections.abc import Sequence

from ...maths.lazy import Tensor, passes, torch


def disjoint_merge(
    deltas: Sequence[Tensor] | Tensor, weights: Sequence[float], *, normalize: bool, scale: float
) -> Tensor:
    """Return the merge of the entries whose weighted sign is the elected one.

    The elected sign is that of Σ wᵢ Δᵢ, + where the sum is zero. The wᵢ Δᵢ that have it are added,
    and divided by the sum of their wᵢ where they are normalised and that sum is not zero.

    Args:
        deltas: trimmed Δᵢ, float32, one shape.
        weights: w, one an expert.
        normalize: average instead of adding.
        scale: factor λ of the result.
    """
    if (found := passes.elected(deltas, weights, normalize, scale)) is not None:
        return found
    # In float64, where the sum of a few float32 differences is exact: a rounded zero has no sign.
    total = torch.zeros_like(deltas[0], dtype=torch.float64)
    for delta, weight in zip(deltas, weights, strict=True):
        total.add_(delta, alpha=weight)
    # A sum of zero is +0 here; float32 keeps the sign of what is too small for it. This and the
    # arithmetic below stand for comparisons, which torch does ten times slower than sums.
    sign = torch.ones_like(deltas[0]).copysign_(total.float())
    del total
    merged = torch.zeros_like(deltas[0])
    share = torch.zeros_like(deltas[0])
    for delta, weight in zip(deltas, weights, strict=True):
        if weight == 0:
            continue
        agreeing = delta * sign
        agreeing = agreeing.clamp_min_(0) if weight > 0 else agreeing.neg_().clamp_min_(0)
        merged.add_(agreeing, alpha=abs(weight))
        if normalize:
            share.add_(agreeing.sign_(), alpha=weight)
    if normalize:
        nobody = 1 - share.sign().abs_()
        merged.div_(share.add_(nobody))
    return merged.mul_(sign).mul_(scale)
