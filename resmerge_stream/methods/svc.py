"""SVC: shrink (or restore) the singular values of another method's update where experts share them.

Li et al. 2026, When shared knowledge hurts; public code lyymuwu/SVC and fusion_bench. With the
inner update M = USVᵀ and s_rⁱ = ⟨u_rᵀM, u_rᵀΔᵢ⟩ / ‖u_rᵀΔᵢ‖², σ_r is multiplied by
γ_r = N / Σᵢ max(α, s_rⁱ). α is 1/N for task arithmetic, DARE, TIES and ISO and 1 for TSV-Merge in
the authors' script (automatic here); fusion_bench uses 0.1, 0.2 and 1. The codes cut denominators
at an absolute 1e-12; here they are relative to σ_r². Matrices only; the rest is the inner method's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..maths.lazy import TaskVectors, Tensor, factors, low_rank, torch
from ..memory import svd_bytes
from ..specs import TensorSpec
from .base import Rule, Site, Update, default_role, is_matrix, param
from .parts.wrapped import Wrapped

# An expert with less than this share of a direction's energy does not take part in it.
_ABSENT = 1e-12


@dataclass(frozen=True, kw_only=True)
class Svc(Wrapped):
    """Another method's update, each singular value calibrated by how much of it every expert
    already holds."""

    name: ClassVar[str] = "svc"
    title: ClassVar[str] = "SVC (after another method)"
    paper: ClassVar[str] = "Li et al. 2026, When shared knowledge hurts (SVC)"
    url: ClassVar[str] = "https://github.com/lyymuwu/SVC"

    alpha: float = param(-1.0, "Least s; −1: 1 for tsv_m, else 1/N", minimum=-1.0, maximum=10.0)

    def rule_for(self, spec: TensorSpec, experts: int) -> Rule:
        """Return this method's rule for matrices, the inner method's for the rest."""
        role = default_role(spec)
        if is_matrix(spec, role):
            return Rule("svc", role, needs_matrix=True)
        return self.wrapped.rule_for(spec, experts)

    def merge(self, vectors: TaskVectors, site: Site) -> Update:
        """Return M + U diag((γ − 1)σ) Vᵀ."""
        inner = self.wrapped.merge(vectors, self.inner_site(site))
        if site.rule.name != "svc":
            return inner

        M = torch.empty(vectors.shape, device=vectors.device)
        for block in vectors.blocks():
            M[block] = inner.rows(block, vectors.stack(block))
        svd = factors.thin_svd(M)
        gamma = self._gamma(vectors, svd)
        change = ((gamma - 1) * svd.sigma).to(svd.U.device)
        left, right = (svd.U * change).float(), svd.V.float().T.contiguous()

        def rows(block: slice, stack: Tensor) -> Tensor:
            return torch.addmm(M[block], left[block], right)

        found = gamma.tolist()
        gates = {"gamma_min": min(found), "gamma_max": max(found)} if found else {}
        return Update(rows, "svc", gates, inner.warnings)

    def _gamma(self, vectors: TaskVectors, svd: low_rank.Factors) -> Tensor:
        """Return γ, float64, shape (r,): N / Σᵢ max(α, s_rⁱ)."""
        if svd.rank == 0:
            return torch.ones(0, dtype=torch.float64)
        alpha = self.alpha
        if alpha < 0:
            alpha = 1.0 if self.wrapped.name == "tsv_m" else 1 / vectors.count
        total = torch.zeros_like(svd.sigma)
        for i in range(vectors.count):
            delta = vectors.matrix(i)
            projected = delta.T.double() @ svd.U.double()
            inner = (projected * svd.V).sum(0).cpu() * svd.sigma
            energy = (projected * projected).sum(0).cpu()
            present = energy > _ABSENT * svd.sigma**2
            s = torch.where(present, inner / energy.clamp_min(1e-300), 0.0)
            total += s.clamp_min(alpha)
        return vectors.count / total.clamp_min(1e-300)

    def scratch_bytes(self, m: int, n: int, experts: int) -> int:
        """Return bytes of the inner method, of M, its SVD, and one Δᵢ projected in float64."""
        inner = self.wrapped.scratch_bytes(m, n, experts)
        return inner + 12 * m * n + svd_bytes(m, n) + 8 * (3 * n + 2 * m) * min(m, n)


METHOD = Svc
