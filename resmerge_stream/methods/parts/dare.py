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

# Entries drawn from one seed, about; a multiple of whole rows.
_CHUNK = 65_536


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
        kept = []
        for i, (delta, density) in enumerate(zip(stack, densities, strict=True)):
            if density < 1:
                delta = delta * keep_mask(site, i, block, delta, density)
                delta = delta.div_(density) if inverse and density > 0 else delta
            kept.append(delta)
        return kept

    return dropped


def keep_mask(site: Site, expert: int, block: slice, delta: Tensor, density: float) -> Tensor:
    """Return which entries of a row block are kept."""
    return drawn(site, expert, block, delta) < density


def drawn(site: Site, expert: int, block: slice, delta: Tensor) -> Tensor:
    """Return a uniform random number from [0, 1) for each entry of a row block.

    Rows are drawn in chunks that depend on the row's length only, each from a seed of the tensor's
    name, the expert and the chunk: the order of work, shards and budget change nothing.
    """
    import torch

    from ...maths.rounding import block_seed

    b, n = delta.shape
    height = max(_CHUNK // n, 1)
    first, last = site.start_row + block.start, site.start_row + block.start + b
    numbers = torch.empty(b, n)
    for chunk in range(first // height, -(-last // height)):
        seed = block_seed(site.seed, f"expert {expert}", chunk)
        generator = torch.Generator().manual_seed(seed)
        chunk_numbers = torch.rand(height, n, generator=generator)
        start = chunk * height
        low, high = max(start, first), min(start + height, last)
        numbers[low - first : high - first] = chunk_numbers[low - start : high - start]
    return numbers.to(delta.device)
