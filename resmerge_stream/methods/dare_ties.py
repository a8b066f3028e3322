"""DARE + TIES: drop entries at random and enlarge the rest, then elect signs and add what agrees.

Yu et al. 2024, https://arxiv.org/abs/2311.03099. Name, parameters and defaults are mergekit's
``dare_ties`` (0.1.5): density 1, the L1 norm restored, what agrees added. The ResMerge paper's
baseline has density 0.2 and does not say which code (preset ``paper``: divided by the density,
averaged). yule-BUAA/MergeLM trims again by magnitude (``mergelm``, its mask rate 0.8 is keep 0.2).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from .base import Site, param
from .parts.dare_method import Dropped
from .parts.sparsified import Sparse

if TYPE_CHECKING:
    from torch import Tensor

    from ..maths.passes import Drop
    from ..maths.task_vectors import TaskVectors


@dataclass(frozen=True, kw_only=True)
class DareTies(Dropped):
    """Each expert keeps a random share of its changes, enlarged to make up for the rest; every
    weight then takes the sum (or mean) of those that have the sign with more total weight."""

    name: ClassVar[str] = "dare_ties"
    title: ClassVar[str] = "DARE + TIES"
    elects: ClassVar[bool] = True
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": {"density": 0.2, "rescale": "inverse", "normalize": True},
        "mergelm": {"density": 0.2, "rescale": "inverse", "trim": "tensor", "normalize": True},
    }
    earlier: ClassVar[Mapping[str, Any]] = {
        "density": 0.2, "rescale": "inverse", "normalize": True,
    }  # fmt: skip

    trim: str = param("none", "Trim by magnitude too (MergeLM)", choices=("none", "tensor"))

    def is_local(self) -> bool:
        """Return whether nothing is ranked."""
        return self.trim == "none"

    def drop(self, vectors: TaskVectors, site: Site) -> Drop | None:
        """Return which entries stay, where chance alone decides."""
        return self._drop(vectors, site) if self.trim == "none" else None

    def sparse(self, vectors: TaskVectors, site: Site) -> tuple[Sparse, Mapping[str, Any]]:
        """Return the dropped task vectors, trimmed where asked."""
        from ..maths.passes import shrunk
        from .parts.trimming import tensor_thresholds

        dropped, gates = super().sparse(vectors, site)
        if self.trim == "none":
            return dropped, gates
        thresholds = tensor_thresholds(vectors, self.density, dropped)

        def trimmed(block: slice, stack: Tensor) -> Sequence[Tensor]:
            kept = dropped(block, stack)
            return [shrunk(delta, tau) for delta, tau in zip(kept, thresholds, strict=True)]

        return trimmed, gates


METHOD = DareTies
