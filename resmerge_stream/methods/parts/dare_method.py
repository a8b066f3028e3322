"""DARE before a sum and before an election, for `dare_linear` and `dare_ties`. Not a method."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from ..base import Site, of_each
from .dare import drop_of
from .sparsified import Sparse, Thinned, rescale_param

if TYPE_CHECKING:
    from ...maths.passes import Drop
    from ...maths.task_vectors import TaskVectors

RESCALES = ("l1", "inverse", "none")
RESCALE_LABEL = "How kept entries grow: to the tensor's L1 norm, by 1/density, or not"


@dataclass(frozen=True, kw_only=True)
class Dropped(Thinned):
    """Each expert keeps a random share of its changes, enlarged to make up for the rest."""

    paper: ClassVar[str] = "Yu et al. 2024, DARE"
    url: ClassVar[str] = "https://arxiv.org/abs/2311.03099"
    earlier: ClassVar[Mapping[str, Any]] = {"density": 0.2, "rescale": "inverse"}

    rescale: str = rescale_param("l1", RESCALE_LABEL, *RESCALES)

    def drop(self, vectors: TaskVectors, site: Site) -> Drop | None:
        """Return which entries stay."""
        return self._drop(vectors, site)

    def sparse(self, vectors: TaskVectors, site: Site) -> tuple[Sparse, Mapping[str, Any]]:
        """Return the dropped task vectors."""
        return self._drop(vectors, site).of_block, {}

    def _drop(self, vectors: TaskVectors, site: Site) -> Drop:
        densities = of_each(self.density, vectors.count)
        return drop_of(site, vectors.shape[1], densities, inverse=self.rescale == "inverse")
