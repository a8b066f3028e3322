"""ISO-C: flatten the spectrum of the summed task vectors.

Marczak et al. 2025, https://arxiv.org/abs/2502.04959; public code danielm1405/iso-merging and
fusion_bench. With M = ΣΔᵢ = USVᵀ and r = min(m, n), ΔW = λ · mean(S) · UVᵀ, mean(S) over all r
values. λ = 1 (the ResMerge paper gives none; the authors tune it). The ``k: 100`` of the paper's
A.2 is the codes' unused share of entries to keep, not a rank. U and V stop at the numerical rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..maths.lazy import TaskVectors, factors
from ..memory import svd_bytes
from .base import Site, Update, param
from .parts.spectral_method import SpectralMethod, product


@dataclass(frozen=True, kw_only=True)
class IsoC(SpectralMethod):
    """The experts' changes are added, then all directions of the sum get the same strength: their
    mean."""

    name: ClassVar[str] = "iso_c"
    title: ClassVar[str] = "ISO-C"
    paper: ClassVar[str] = "Marczak et al. 2025, No task left behind (isotropic merging)"
    url: ClassVar[str] = "https://arxiv.org/abs/2502.04959"
    low_rank: ClassVar[bool] = True

    scale: float = param(1.0, "Factor λ of the result", minimum=-10.0, maximum=10.0)

    def merge_spectrum(self, vectors: TaskVectors, site: Site) -> Update:
        """Return λ · mean(S) · UVᵀ."""
        common = factors.svd_of_sum(vectors)
        level = float(common.sigma.sum()) / min(vectors.shape)
        gates = {
            "directions": common.rank,
            "flatness": float(common.sigma[0]) / level if common.rank else None,
        }
        left = (common.U * (self.scale * level)).float()
        return product(left, common.V.float(), "iso_c", gates)

    def scratch_bytes(self, m: int, n: int, experts: int) -> int:
        """Return bytes of the sum, its SVD, and the scaled factors."""
        return 4 * m * n + svd_bytes(m, n) + 4 * (m + n) * min(m, n)


METHOD = IsoC
