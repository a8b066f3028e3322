"""DARE's random drop, shared by `dare_linear` and `dare_ties`. Not a method itself.

Yu et al. 2024, https://arxiv.org/abs/2311.03099: keep each entry of Δ with probability p, divide
by p. Public code: yule-BUAA/MergeLM (divides by p), mergekit (matches the L1 norm of the tensor).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from ..base import Site

if TYPE_CHECKING:
    from torch import Tensor

    from ...maths.task_vectors import TaskVectors

RESCALES = ("inverse", "l1", "none")
# Entries drawn from one seed, about; a multiple of whole rows.
_CHUNK = 65_536


def dropper(
    vectors: TaskVectors, site: Site, *, density: float, rescale: str
) -> Callable[[slice, Tensor], list[Tensor]]:
    """Return a function of a row block that gives the dropped and rescaled Δᵢ.

    Args:
        vectors: the task vectors; read whole for ``l1``.
        site: gives the seed.
        density: p, the probability of keeping an entry.
        rescale: ``inverse`` (1/p), ``l1`` (‖Δ‖₁ / ‖kept Δ‖₁ of the tensor) or ``none``.
    """
    factors = [1 / density if rescale == "inverse" and density > 0 else 1.0] * vectors.count

    def dropped(block: slice, stack: Tensor) -> list[Tensor]:
        return [
            delta * keep_mask(site, i, block, delta, density) * factor
            for i, (delta, factor) in enumerate(zip(stack, factors, strict=True))
        ]

    if rescale == "l1":
        factors = _l1_factors(vectors, dropped)
    return dropped


def keep_mask(site: Site, expert: int, block: slice, delta: Tensor, density: float) -> Tensor:
    """Return which entries of a row block are kept.

    Rows are drawn in chunks that depend on the row's length only, each from a seed of the tensor's
    name, the expert and the chunk: the order of work, shards and budget change nothing.
    """
    import torch

    from ...maths.rounding import block_seed

    b, n = delta.shape
    if density >= 1.0:
        return torch.ones(b, n, dtype=torch.bool, device=delta.device)
    height = max(_CHUNK // n, 1)
    first, last = site.start_row + block.start, site.start_row + block.start + b
    mask = torch.empty(b, n, dtype=torch.bool)
    for chunk in range(first // height, -(-last // height)):
        seed = block_seed(site.seed, f"expert {expert}", chunk)
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.rand(height, n, generator=generator) < density
        start = chunk * height
        low, high = max(start, first), min(start + height, last)
        mask[low - first : high - first] = drawn[low - start : high - start]
    return mask.to(delta.device)


def _l1_factors(
    vectors: TaskVectors, dropped: Callable[[slice, Tensor], list[Tensor]]
) -> list[float]:
    import torch

    before, after = [0.0] * vectors.count, [0.0] * vectors.count
    for block in vectors.blocks():
        stack = vectors.stack(block)
        for i, kept in enumerate(dropped(block, stack)):
            before[i] += float(stack[i].abs().sum(dtype=torch.float64))
            after[i] += float(kept.abs().sum(dtype=torch.float64))
    return [x / y if y > 0 else 1.0 for x, y in zip(before, after, strict=True)]
