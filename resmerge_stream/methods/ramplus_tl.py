"""RAM+, tensor by tensor: RAM with each expert's lone changes enlarged by how much of it is shared.

Yuan et al. 2026, https://arxiv.org/abs/2601.13572; name, parameters and formula are mergekit's
``ramplus_tl`` (0.1.5): with sᵢ of expert i's changed entries shared and uᵢ its own alone, lone
changes are multiplied by 1 + r · min(sᵢ / uᵢ, α). `ram_plus` has the ratios of the whole model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..maths.lazy import TaskVectors, Tensor
from .base import MergeMethod, Site, Update, param
from .ram import shared_mean
from .ram_plus import Overlap


@dataclass(frozen=True, kw_only=True)
class RamPlusTensorLocal(MergeMethod):
    """RAM, but changes that one expert alone made grow, the more of that expert's changes to the
    tensor other experts share."""

    name: ClassVar[str] = "ramplus_tl"
    title: ClassVar[str] = "RAM+ (tensor by tensor)"
    paper: ClassVar[str] = "Yuan et al. 2026, RAM"
    url: ClassVar[str] = "https://arxiv.org/abs/2601.13572"
    in_pieces: ClassVar[bool] = False

    r: float = param(0.1, "How much lone changes grow", minimum=0.0, maximum=10.0)
    alpha: float = param(0.2, "Cut of the ratio", minimum=0.0, maximum=10.0)
    epsilon: float = param(1e-5, "Smaller changes count as none", minimum=0.0, maximum=1.0)

    def merge(self, vectors: TaskVectors, site: Site) -> Update:
        """Return the shared mean, lone changes times their expert's factor."""
        overlap = Overlap(vectors.count, self.epsilon)
        overlap.count(vectors, range(vectors.count))
        counts = overlap.result()
        factors = []
        for changed, shared in zip(counts["ram_changed"], counts["ram_shared"], strict=True):
            ratio = shared / max(changed - shared, self.epsilon)
            factors.append(1.0 + self.r * min(ratio, self.alpha))

        def rows(block: slice, stack: Tensor) -> Tensor:
            return shared_mean(stack, self.epsilon, factors)

        return Update(rows, "ramplus_tl", {"unique_factors": factors})


METHOD = RamPlusTensorLocal
