"""SWUDI: least interference with every task vector's own inputs, by one spectral filter.

Wei et al. 2026, https://arxiv.org/abs/2606.07289; public code: swudi_aswudi.py for MLLMerging. WUDI
(Cheng et al. 2025, https://arxiv.org/abs/2503.08099) minimises Σ_i ‖(X − Δ_i)Δ_iᵀ‖²/‖Δ_i‖² from
Θ = ΣΔ_i by gradient descent. With C = Σ Δ_iᵀΔ_i/‖Δ_i‖² = VΛVᵀ and D = Σ Δ_iΔ_iᵀΔ_i/‖Δ_i‖², t steps
of gradient flow lead to

    ΔW = Θ + (D V f(Λ)/Λ − Θ V f(Λ)) Vᵀ,   f(λ) = 1 − exp(−tλ),

and SWUDI sets f to 0 outside of the K = ⌈keep·n⌉ largest λ. Here t = 300 and keep = 0.85, which the
release names for language models. ``keep: 1`` is WUDI itself as gradient flow: its code runs Adam
at a fixed learning rate, whose result depends on the length of the updates.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from ..maths.lazy import TaskVectors, Tensor, factors, low_rank, torch
from ..memory import svd_bytes
from .base import Site, Update, param
from .parts.spectral_method import SpectralMethod

# Release: smaller eigenvalues of C count as this.
_LEAST_EIGENVALUE = 1e-8


@dataclass(frozen=True, kw_only=True)
class Swudi(SpectralMethod):
    """The sum of the updates, corrected on the inputs that the updates themselves respond to: there
    each expert's own action comes back, strongest directions first."""

    name: ClassVar[str] = "swudi"
    title: ClassVar[str] = "SWUDI"
    paper: ClassVar[str] = "Wei et al. 2026, Closed-form spectral regularization"
    url: ClassVar[str] = "https://arxiv.org/abs/2606.07289"

    time: float = param(300.0, "Time t of the gradient flow", minimum=0.0, maximum=1e9)
    keep: float = param(0.85, "Share of the directions that are kept", minimum=0.0, maximum=1.0)
    scale: float = param(1.0, "Factor λ of the result", minimum=-10.0, maximum=10.0)

    def merge_spectrum(self, vectors: TaskVectors, site: Site) -> Update:
        """Return λ·(Θ + (D V f/Λ − Θ V f) Vᵀ), within the rows that the task vectors span."""
        norms = vectors.gram().diagonal().sqrt().tolist()
        svd = factors.thin_svd(_side_by_side(vectors, norms))
        left, kept = self._correction(svd, norms, vectors.shape)
        left, right = (left * self.scale).float(), svd.V.T.float().contiguous()

        def rows(block: slice, stack: Tensor) -> Tensor:
            update = stack[0] * self.scale
            for delta in stack[1:]:
                update.add_(delta, alpha=self.scale)
            return update.addmm_(left[block], right)

        return Update(rows, "swudi", {"directions": kept})

    def scratch_bytes(self, m: int, n: int, experts: int) -> int:
        """Return bytes of the task vectors on top of each other, and of their SVD."""
        return 4 * experts * m * n + 2 * svd_bytes(experts * m, n)

    def _correction(
        self, svd: low_rank.Factors, norms: list[float], shape: tuple[int, int]
    ) -> tuple[Tensor, int]:
        """Return D V f/Λ − Θ V f, float64, shape (m, rank), and how many directions count.

        Task vector i is ‖Δ_i‖·U_i·diag(σ)·Vᵀ with U_i its rows of U, and Λ = σ².
        """
        m, n = shape
        sigma = svd.sigma.to(svd.U.device)
        eigenvalues = (sigma**2).clamp_min(_LEAST_EIGENVALUE)
        kept = min(max(math.ceil(self.keep * n - 1e-9), 1), svd.rank)
        f = -torch.expm1(-eigenvalues * self.time)
        f[kept:] = 0
        left = torch.zeros(m, svd.rank, dtype=torch.float64, device=svd.U.device)
        for i, norm in enumerate(norms):
            U = svd.U[i * m : (i + 1) * m].double() * sigma
            left += norm * (U @ ((U.T @ U) * (f / eigenvalues)) - U * f)
        return left, kept


def _side_by_side(vectors: TaskVectors, norms: list[float]) -> Tensor:
    """Return the Δ_i/‖Δ_i‖ on top of each other, float32, shape (N·m, n); zero where Δ_i is."""
    m, n = vectors.shape
    stacked = torch.empty(vectors.count, m, n, device=vectors.device)
    scales = torch.tensor([1 / norm if norm > 0 else 0.0 for norm in norms], device=vectors.device)
    for rows in vectors.blocks():
        torch.mul(vectors.stack(rows), scales[:, None, None].float(), out=stacked[:, rows])
    return stacked.view(-1, n)


METHOD = Swudi
