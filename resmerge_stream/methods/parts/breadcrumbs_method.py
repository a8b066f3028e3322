"""Breadcrumbs before a sum and before an election: without the largest changes and without the
smallest. Not a method.

Davari and Belilovsky 2023, https://arxiv.org/abs/2312.06795, as mergekit 0.1.5 has it: of d entries
the ⌊γ·d⌋ of largest magnitude go, then ⌊density·d⌋ stay. Where that is more than is left, fewer of
the largest go. Entries equal to either threshold are all kept; mergekit cuts them in a sort's
order.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from ..base import Site, of_each, param
from .sparsified import Sparse, Thinned

if TYPE_CHECKING:
    from torch import Tensor

    from ...maths.task_vectors import TaskVectors


@dataclass(frozen=True, kw_only=True)
class Trimmed(Thinned):
    """Of each expert's changes the largest and the smallest are dropped."""

    paper: ClassVar[str] = "Davari and Belilovsky 2023, Model breadcrumbs"
    url: ClassVar[str] = "https://arxiv.org/abs/2312.06795"

    gamma: float | tuple[float, ...] = param(
        0.01, "Share of largest entries to drop", minimum=0.0, maximum=1.0, each=True
    )

    def is_local(self) -> bool:
        """Return False: entries are ranked in the whole tensor."""
        return False

    def sparse(self, vectors: TaskVectors, site: Site) -> tuple[Sparse, Mapping[str, Any]]:
        """Return the task vectors between two magnitudes."""
        from torch.nn.functional import hardshrink

        from ...maths.passes import shrunk
        from .trimming import magnitudes_at

        m, n = vectors.shape
        shares = zip(
            of_each(self.density, vectors.count), of_each(self.gamma, vectors.count), strict=True
        )
        places = [ranks(m * n, density, gamma) for density, gamma in shares]

        def twice(block: slice, stack: Tensor) -> list[Tensor]:
            return [delta for delta in stack for _ in range(2)]

        found = magnitudes_at(vectors, [rank for pair in places for rank in pair], twice)
        bounds = []
        for i, (first, last) in enumerate(places):
            upper = found[2 * i] if first is not None else math.inf
            lower = found[2 * i + 1] if last is not None else (0.0 if first is None else math.inf)
            bounds.append((lower or 0.0, math.inf if upper is None else upper))

        def between(block: slice, stack: Tensor) -> Sequence[Tensor]:
            kept = []
            for delta, (lower, upper) in zip(stack, bounds, strict=True):
                part = shrunk(delta, lower)
                if math.isfinite(upper):
                    part = part.sub_(hardshrink(delta, upper))
                kept.append(part)
            return kept

        return between, {"trim_bounds": [list(pair) for pair in bounds]}


def ranks(numel: int, density: float, gamma: float) -> tuple[int | None, int | None]:
    """Return the ranks, from the largest, of the first and the last entry that is kept.

    None where there is no such bound; (1, None) where nothing is kept.
    """
    if density >= 1 or not numel:
        return None, None
    kept, above = int(density * numel), int(gamma * numel)
    below = max(0, numel - kept - above)
    above = numel - kept - below
    if kept == 0:
        return 1, None
    return (above + 1 if above else None), above + kept
