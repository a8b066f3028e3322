"""DELLA before a sum and before an election: large changes are kept more often. Not a method.

Deep et al. 2024, https://arxiv.org/abs/2406.11617, as mergekit 0.1.5 has it: in each row the entry
of rank r of n magnitudes (1 the smallest) stays with probability density − ε + 2ε·(r − 1)/(n − 1).
A vector is one row. Equal magnitudes are ranked in their order in the row. The random numbers are
our own (`dare.drawn`): the same distribution as mergekit's, not the same bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from ..base import Site, of_each, param
from .dare import drawn
from .sparsified import Sparse, Thinned, rescale_param

if TYPE_CHECKING:
    from torch import Tensor

    from ...maths.task_vectors import TaskVectors

RESCALES = ("l1", "inverse", "none")
# Entries whose keys stay in the cache while they are sorted.
_SORTED_ENTRIES = 1 << 15


@dataclass(frozen=True, kw_only=True)
class MagnitudeDropped(Thinned):
    """Each expert keeps a random share of its changes, of the large ones more."""

    paper: ClassVar[str] = "Deep et al. 2024, DELLA-Merging"
    url: ClassVar[str] = "https://arxiv.org/abs/2406.11617"

    masks: ClassVar[bool] = True

    epsilon: float | tuple[float, ...] = param(
        0.15, "How much likelier large entries stay", minimum=0.0, maximum=0.5, each=True
    )
    rescale: str = rescale_param(
        "l1", "How kept entries grow: to the tensor's L1 norm, by 1/probability, or not", *RESCALES
    )

    def check_weights(self, weights: tuple[float, ...]) -> str | None:
        """Return a problem where a probability would leave (0, 1)."""
        count = max(len(weights), 1)
        for density, epsilon in zip(
            of_each(self.density, count), of_each(self.epsilon, count), strict=False
        ):
            if 0 < density < 1 and not (density - epsilon > 0 and density + epsilon < 1):
                return (
                    f"{self.name}: density {density:g} − and + epsilon {epsilon:g} must both lie "
                    "between 0 and 1, for they are probabilities. Give a smaller epsilon."
                )
        return None

    def sparse(self, vectors: TaskVectors, site: Site) -> tuple[Sparse, Mapping[str, Any]]:
        """Return the task vectors with entries dropped by rank and chance."""
        densities = of_each(self.density, vectors.count)
        epsilons = of_each(self.epsilon, vectors.count)
        inverse = self.rescale == "inverse"

        def dropped(block: slice, stack: Tensor) -> list[Tensor]:
            kept = []
            for i, (delta, p, e) in enumerate(zip(stack, densities, epsilons, strict=True)):
                if p <= 0:
                    delta = delta * 0
                elif p < 1:
                    chance = chances(delta, p, e, is_row=len(site.spec.shape) < 2)
                    mask = drawn(site, i, block, delta) < chance
                    delta = delta * mask
                    delta = delta.div_(chance) if inverse else delta
                kept.append(delta)
            return kept

        return dropped, {}


def chances(delta: Tensor, density: float, epsilon: float, *, is_row: bool) -> Tensor:
    """Return the probability of keeping each entry of some rows, shape (b, n).

    Args:
        delta: Δ of whole rows; of a vector, which is one row, one entry a line.
        density, epsilon: the middle and half the width of the probabilities.
        is_row: whether this is a vector.
    """
    import torch

    rows = delta.T if is_row else delta
    n = rows.shape[1]
    places = torch.linspace(density - epsilon, density + epsilon, n, device=delta.device)
    order = _ascending(rows)
    found = torch.empty_like(rows).scatter_(1, order, places.expand_as(order))
    return found.T if is_row else found


def _ascending(rows: Tensor) -> Tensor:
    """Return the order of the magnitudes in each row, equal ones in the order of their places."""
    import numpy as np
    import torch

    if rows.device.type != "cpu" or rows.dtype != torch.float32:
        return rows.abs().argsort(dim=1, stable=True)
    # Bit patterns of magnitudes are ordered like them: with its place below it each is a different
    # number, and numbers are sorted by numpy in half the time of torch's stable order.
    b, n = rows.shape
    order = np.empty((b, n), np.int64)
    places, height = np.arange(n), max(_SORTED_ENTRIES // max(n, 1), 1)
    for start in range(0, b, height):
        keys = order[start : start + height]
        keys[...] = rows[start : start + height].abs().view(torch.int32).numpy()
        keys <<= 32
        keys |= places
        keys.sort(axis=1)
        keys &= 0xFFFFFFFF
    return torch.from_numpy(order)
