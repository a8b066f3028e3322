"""DELLA before a sum and before an election: large changes are kept more often. Not a method.

Deep et al. 2024, https://arxiv.org/abs/2406.11617, as mergekit 0.1.5 has it: in each row the entry
of rank r of n magnitudes (1 the smallest) stays with probability density − ε + 2ε·(r − 1)/(n − 1).
A vector is one row. Equal magnitudes are ranked in their order in the row. The random numbers are
our own (`dare.key_of`): the same distribution as mergekit's, not the same bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from ..base import Site, of_each, param
from .dare import key_of, place_of
from .sparsified import Sparse, Thinned, rescale_param

if TYPE_CHECKING:
    from torch import Tensor

    from ...maths.task_vectors import TaskVectors

RESCALES = ("l1", "inverse", "none")


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
        is_row = len(site.spec.shape) < 2

        def dropped(block: slice, stack: Tensor) -> list[Tensor]:
            from ...maths import passes

            kept = []
            for i, (delta, p, e) in enumerate(zip(stack, densities, epsilons, strict=True)):
                if p <= 0:
                    delta = delta * 0
                elif p < 1:
                    rows = delta.T if is_row else delta
                    numbers = key_of(site, i), place_of(site, block, delta)
                    chances = chances_of(rows.shape[1], p, e)
                    found = passes.dropped_by_rank(rows, *numbers, chances, inverse=inverse)
                    delta = found.T if is_row else found
                kept.append(delta)
            return kept

        return dropped, {}


def chances_of(n: int, density: float, epsilon: float) -> Tensor:
    """Return the probabilities of keeping the n entries of a row, of the smallest magnitude first.

    Args:
        n: length of a row.
        density, epsilon: the middle and half the width of the probabilities.
    """
    import torch

    return torch.linspace(density - epsilon, density + epsilon, n)
