"""TSV-Merge: the experts' leading singular vectors side by side, made orthogonal, recombined.

Gargiulo et al. 2025, https://arxiv.org/abs/2412.00081; public code AntoAndGar/task_singular_vectors
and fusion_bench. With r = min(m, n), each expert gives its k = ⌊r/N⌋ leading triplets;
ΔW = λ · polar([U₁ … U_N]) · diag(S₁ … S_N) · polar([V₁ … V_N])ᵀ with polar(A) = A(AᵀA)^(−1/2).
λ = 1 (the ResMerge paper's setting; the authors tune it on data). An expert of lower rank gives as
many triplets as it has: the codes take LAPACK's arbitrary null vectors there, which changes ΔW.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..maths.lazy import TaskVectors, Tensor, factors, torch
from ..memory import KEPT_BUFFER_BYTES, svd_bytes
from .base import Site, Update, param
from .parts.spectral_method import SpectralMethod, product


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
        U, sigma, V = leading_factors(vectors, min(vectors.shape) // vectors.count)
        weights = (sigma * self.scale).float().to(U.device)
        gates = {"directions": len(sigma), "sigma_max": float(sigma.max()) if len(sigma) else 0.0}
        return product(factors.polar(U).mul_(weights), factors.polar(V), "tsv_m", gates)

    def scratch_bytes(self, m: int, n: int, experts: int) -> int:
        """Return bytes of N SVDs, and of the vectors side by side."""
        return stacked_bytes(m, n, experts)


def leading_factors(vectors: TaskVectors, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return [U₁ … U_N], the concatenated σ (float64, CPU) and [V₁ … V_N] of k triplets each.

    An expert of numerical rank below k gives what it has.
    """
    found = [factors.svd_of(vectors, i) for i in range(vectors.count)]
    U = torch.cat([svd.U[:, :k] for svd in found], dim=1)
    V = torch.cat([svd.V[:, :k] for svd in found], dim=1)
    return U, torch.cat([svd.sigma[:k] for svd in found]), V


def stacked_bytes(m: int, n: int, experts: int) -> int:
    """Return bytes of N SVDs and of r of their vectors side by side, whitened.

    Of factors that are smaller than `KEPT_BUFFER_BYTES` the C library keeps some for the next
    matrix, up to four such buffers for each thread that works.
    """
    short = min(m, n)
    is_kept = 8 * short * short <= KEPT_BUFFER_BYTES
    kept = min(12 * KEPT_BUFFER_BYTES, 40 * (m + n) * short) if is_kept else 0
    return svd_bytes(m, n, experts) + 24 * (m + n) * short + 40 * short**2 + kept


METHOD = TsvMerge
