"""DARE's random drop, shared by the methods that end in it. Not a method itself.

Yu et al. 2024, https://arxiv.org/abs/2311.03099: keep each entry of Δ with probability p, divide
by p. Public code: yule-BUAA/MergeLM (divides by p), mergekit (matches the L1 norm of the tensor).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from ..base import Site

if TYPE_CHECKING:
    from torch import Tensor


def dropper(
    site: Site, densities: Sequence[float], *, inverse: bool
) -> Callable[[slice, Tensor], list[Tensor]]:
    """Return a function of a row block that gives the dropped Δᵢ.

    Args:
        site: gives the seed.
        densities: pᵢ, the probability of keeping an entry, one an expert.
        inverse: divide what is kept by pᵢ.
    """

    def dropped(block: slice, stack: Tensor) -> list[Tensor]:
        from ...maths import passes

        kept = []
        for i, (delta, density) in enumerate(zip(stack, densities, strict=True)):
            if density < 1:
                factor = 1 / density if inverse and density > 0 else 1.0
                place = place_of(site, block, delta)
                delta = passes.dropped(delta, key_of(site, i), place, density, factor)
            kept.append(delta)
        return kept

    return dropped


def key_of(site: Site, expert: int) -> int:
    """Return the key of the random numbers of a tensor and an expert."""
    from ...maths.rounding import block_seed

    return block_seed(site.seed, f"expert {expert}", 0)


def place_of(site: Site, block: slice, delta: Tensor) -> int:
    """Return the place of a row block's first entry in its tensor: the order of work, shards and
    budget change nothing."""
    row: int = site.start_row + block.start
    return row * delta.shape[1]
