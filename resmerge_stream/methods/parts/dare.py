"""DARE's random drop, shared by the methods that end in it. Not a method itself.

Yu et al. 2024, https://arxiv.org/abs/2311.03099: keep each entry of Δ with probability p, divide
by p. Public code: yule-BUAA/MergeLM (divides by p), mergekit (matches the L1 norm of the tensor).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..base import Site

if TYPE_CHECKING:
    from torch import Tensor

    from ...maths.passes import Drop


def drop_of(site: Site, columns: int, densities: Sequence[float], *, inverse: bool) -> Drop:
    """Return which entries of a matrix stay.

    Args:
        site: gives the seed.
        columns: n.
        densities: pᵢ, the probability of keeping an entry, one an expert.
        inverse: divide what is kept by pᵢ.
    """
    from ...maths.passes import Drop

    return Drop(
        keys=tuple(key_of(site, i) for i in range(len(densities))),
        first=site.start_row * columns,
        densities=tuple(densities),
        factors=tuple(1 / p if inverse and 0 < p < 1 else 1.0 for p in densities),
    )


def key_of(site: Site, expert: int) -> int:
    """Return the key of the random numbers of a tensor and an expert."""
    from ...maths.rounding import block_seed

    return block_seed(site.seed, f"expert {expert}", 0)


def place_of(site: Site, block: slice, delta: Tensor) -> int:
    """Return the place of a row block's first entry in its tensor: the order of work, shards and
    budget change nothing."""
    row: int = site.start_row + block.start
    return row * delta.shape[1]
