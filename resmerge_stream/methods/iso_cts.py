"""ISO-CTS: a common subspace of the sum, room for each expert's own directions, then flattened.

Marczak et al. 2025, https://arxiv.org/abs/2502.04959; public code danielm1405/iso-merging and
fusion_bench. Of r = min(m, n) directions about `common_fraction` are the leading ones of ΣΔᵢ; the
rest is shared out, s for each expert, the leading ones of Δ̃ᵢ = Δᵢ − U_cU_cᵀΔᵢ (projected on the
left only, as in the code). ΔW = λ · mean of all these σ · polar([U₁ … U_N, U_c]) ·
polar([V₁ … V_N, V_c])ᵀ. Fraction 0.8 (the ResMerge paper), λ = 1. Truncated at the numerical rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..maths.lazy import TaskVectors, Tensor, factors, low_rank, torch
from ..memory import svd_bytes
from .base import Site, Update, param
from .parts.spectral_method import SpectralMethod, product


@dataclass(frozen=True, kw_only=True)
class IsoCts(SpectralMethod):
    """The strongest directions of the experts' sum, completed by each expert's own; all get the
    same strength."""

    name: ClassVar[str] = "iso_cts"
    title: ClassVar[str] = "ISO-CTS"
    paper: ClassVar[str] = "Marczak et al. 2025, No task left behind (isotropic merging)"
    url: ClassVar[str] = "https://arxiv.org/abs/2502.04959"

    common_fraction: float = param(0.8, "Share of common directions", minimum=0.0, maximum=1.0)
    scale: float = param(1.0, "Factor λ of the result", minimum=-10.0, maximum=10.0)

    def merge_spectrum(self, vectors: TaskVectors, site: Site) -> Update:
        """Return λ · mean(σ) · polar(Û) · polar(V̂)ᵀ."""
        r = min(vectors.shape)
        common = int(r * self.common_fraction)
        # Python rounds halves to even, and so does the code.
        shared_out = min(
            round((r - common) / vectors.count) * vectors.count, r // vectors.count * vectors.count
        )
        common, own = r - shared_out, shared_out // vectors.count
        shared = factors.svd_of_sum(vectors)
        U_c, V_c = shared.U[:, :common], shared.V[:, :common]
        parts = [_own_directions(vectors, i, U_c, own) for i in range(vectors.count if own else 0)]
        U = torch.cat([*(part.U for part in parts), U_c], dim=1)
        V = torch.cat([*(part.V for part in parts), V_c], dim=1)
        sigma = torch.cat([*(part.sigma for part in parts), shared.sigma[:common]])
        level = float(sigma.sum()) / (common + own * vectors.count)
        gates = {"directions": U.shape[1], "common": common, "own": own}
        return product(
            factors.polar(U).mul_(self.scale * level), factors.polar(V), "iso_cts", gates
        )

    def scratch_bytes(self, m: int, n: int, experts: int) -> int:
        """Return bytes of the sum's SVD, a projected Δᵢ in float64, and the stacked vectors."""
        short = min(m, n)
        return 12 * m * n + svd_bytes(m, n, 2) + 24 * (m + n) * short


def _own_directions(vectors: TaskVectors, i: int, U_c: Tensor, keep: int) -> low_rank.Factors:
    """Return the leading triplets of Δᵢ − U_cU_cᵀΔᵢ, in float64."""
    rest = vectors.matrix(i).double()
    norm = torch.linalg.vector_norm(rest)
    basis = U_c.double()
    rest.addmm_(basis, basis.T @ rest, alpha=-1.0)
    # What rounding leaves of a matrix inside the common directions has none of its own.
    return factors.thin_svd(
        rest, keep if torch.linalg.vector_norm(rest) > factors.RANK_TOLERANCE * norm else 0
    )


METHOD = IsoCts
