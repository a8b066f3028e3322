"""TSV-Merge: the experts' leading singular vectors side by side, made orthogonal, recombined.

Gargiulo et al. 2025, https://arxiv.org/abs/2412.00081; public code AntoAndGar/task_singular_vectors
and fusion_bench. With r = min(m, n), each expert gives its k = ⌊r/N⌋ leading triplets;
ΔW = λ · polar([U₁ … U_N]) · diag(S₁ … S_N) · polar([V₁ … V_N])ᵀ with polar(A) = A(AᵀA)^(−1/2).
λ = 1 (the ResMerge paper's setting; the authors tune it on data). An expert of lower rank gives as
many triplets as it has: the codes take LAPACK's arbitrary null vectors there, which changes ΔW.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from .base import Site, Update, param
from .parts.spectral_method import SpectralMethod, product

if TYPE_CHECKING:
    from torch import Tensor

    from ..maths.task_vectors import TaskVectors


@dataclass(frozen=True, kw_only=True)
class TsvMerge(SpectralMethod):
    """Each expert gives its strongest directions, an equal share of what the matrix can hold; where
    they overlap they are turned apart, so that none is counted twice."""

    name: ClassVar[str] = "tsv_m"
    title: ClassVar[str] = "TSV-Merge"
    paper: ClassVar[str] = "Gargiulo et al. 2025, Task singular vectors"
    url: ClassVar[str] = "https://arxiv.org/abs/2412.00081"
    low_rank: ClassVar[bool] = True

    scale: float = param(1.0, "Factor λ of the result", minimum=-10.0, maximum=10.0)

    def merge_spectrum(self, vectors: TaskVectors, site: Site) -> Update:
        """Return λ · polar(Û) · diag(Ŝ) · polar(V̂)ᵀ."""
        from ..maths.factors import polar

        U, sigma, V = leading_factors(vectors, min(vectors.shape) // vectors.count)
        weights = (sigma * self.scale).float().to(U.device)
        gates = {"directions": len(sigma), "sigma_max": float(sigma.max()) if len(sigma) else 0.0}
        return product(polar(U).mul_(weights), polar(V), "tsv_m", gates)

    def scratch_bytes(self, m: int, n: int, experts: int) -> int:
        """Return bytes of N SVDs, and of the vectors side by side."""
        return stacked_bytes(m, n, experts)


def leading_factors(vectors: TaskVectors, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return [U₁ … U_N], the concatenated σ (float64, CPU) and [V₁ … V_N] of k triplets each.

    An expert of numerical rank below k gives what it has.
    """
    import torch

    from ..maths.factors import svd_of

    found = [svd_of(vectors, i) for i in range(vectors.count)]
    U = torch.cat([factors.U[:, :k] for factors in found], dim=1)
    V = torch.cat([factors.V[:, :k] for factors in found], dim=1)
    return U, torch.cat([factors.sigma[:k] for factors in found]), V


def stacked_bytes(m: int, n: int, experts: int) -> int:
    """Return bytes of N SVDs and of r of their vectors side by side, whitened."""
    from ..memory import svd_bytes

    short = min(m, n)
    return svd_bytes(m, n, experts) + 24 * (m + n) * short + 40 * short**2


METHOD = TsvMerge
