"""SAR: each expert's strongest directions, as far as they lie in the base's own spectral space.

Zhang et al. 2026, https://arxiv.org/abs/2607.03065 (Algorithm 1); public code zzlsms/RL-Rewiring.
Δ_i is cut to its k = max(1, ⌊ratio·min(m, n)⌋) leading triplets and projected on both sides:
ΔW_i = U(Uᵀ Δ_i,k V)Vᵀ with U, V the base's leading singular vectors; the merge is λ·ΣΔW_i. The
paper's Algorithm takes k of the base's vectors as well. The release takes all of them
(``--svd_rank 1000000``), which leaves the long side's complement as all that is cut away. Tensors
that are not decomposed stay the base's, as in the release.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..maths.lazy import TaskVectors, Tensor, factors, products, spectral, torch
from ..memory import gram_bytes, solver_bytes, svd_bytes
from .base import OTHER_CHOICES, Site, Update, param
from .parts.heads import heads_of
from .parts.spectral_method import SpectralMethod, product

VARIANTS = ("paper", "release")


@dataclass(frozen=True, kw_only=True)
class Sar(SpectralMethod):
    """Each expert's strongest directions, turned into the base's own strongest directions; the rest
    of every update is left out."""

    name: ClassVar[str] = "sar"
    title: ClassVar[str] = "SAR"
    paper: ClassVar[str] = "Zhang et al. 2026, Spectral rewiring"
    url: ClassVar[str] = "https://arxiv.org/abs/2607.03065"

    variant: str = param("paper", "How many of the base's directions count", choices=VARIANTS)
    ratio: float = param(0.01, "Share of the rank that is kept", minimum=1e-4, maximum=1.0)
    scale: float = param(1.0, "Factor λ of the result", minimum=-10.0, maximum=10.0)
    other: str = param("base", "Rule of tensors without SVD", choices=OTHER_CHOICES)

    def merge_spectrum(self, vectors: TaskVectors, site: Site) -> Update:
        """Return λ·Σ U(Uᵀ Δ_i,k V)Vᵀ."""
        energies = vectors.gram().diagonal().tolist()
        alive = [i for i, energy in enumerate(energies) if energy > 0]
        k = self._rank(vectors.shape)
        heads = [head for head in heads_of(vectors, k, energies) if head is not None]
        V = torch.cat([head.V for head in heads], dim=1)
        Y = vectors.project(V)
        width = V.shape[1] // len(alive)
        own = [Y[i, :, j * width : (j + 1) * width] for j, i in enumerate(alive)]
        U0, V0 = self._base_directions(vectors, k)
        kept = torch.cat(own, dim=1).double()
        left, right = U0 @ (U0.T @ kept), V0 @ (V0.T @ V.double())
        gates = {
            "rank": k,
            "base_rank": U0.shape[1],
            "head_energy": _energies(own, energies, alive),
        }
        warnings = () if U0.shape[1] else ("the base is zero here: nothing of any update is kept",)
        update = product((self.scale * left).float(), right.float(), "sar", gates)
        return Update(update.rows, "sar", gates, warnings)

    def directions(self, m: int, n: int) -> int:
        """Return how many directions a head has, or all where the base is decomposed whole."""
        return min(m, n) if self.variant == "release" else self._rank((m, n))

    def scratch_bytes(self, m: int, n: int, experts: int) -> int:
        """Return bytes of the base, of its SVD and the heads', and of their products."""
        k = self._rank((m, n))
        base = 4 * m * n + (svd_bytes(m, n) if self.variant == "release" else 0)
        return (
            base
            + solver_bytes(m, n, k, "auto", experts)
            + 8 * experts**2 * k * m
            + 32 * (m + n) * k
        )

    def shared_scratch_bytes(self, m: int, n: int) -> int:
        """Return bytes of the solver's fallback, which threads take in turn."""
        return gram_bytes(m, n, self._rank((m, n)))

    def _rank(self, shape: tuple[int, int]) -> int:
        # 1e-9: 0.07 · 100 is 7.000000000000001, and 0.29 · 100 is 28.999999999999996.
        return max(1, int(self.ratio * min(shape) + 1e-9))

    def _base_directions(self, vectors: TaskVectors, k: int) -> tuple[Tensor, Tensor]:
        """Return U (m × r) and V (n × r) of the base, float64; r is 0 where the base is zero."""
        base = torch.empty(vectors.shape, device=vectors.device)
        for rows in vectors.blocks():
            base[rows] = vectors.base(rows)
        if self.variant == "release" or not base.any():
            svd = factors.thin_svd(base)
            return svd.U.double(), svd.V.double()
        V = spectral.top_singular(base, k, alone=vectors.alone).V
        U = products.matmul(base, V.float()).double()
        return U / torch.linalg.vector_norm(U, dim=0).clamp_min(1e-300), V


def _energies(own: list[Tensor], energies: list[float], alive: list[int]) -> list[float]:
    """Return the share of ‖Δ_i‖² that each expert's kept triplets have."""
    shares = [0.0] * len(energies)
    for i, action in zip(alive, own, strict=True):
        shares[i] = min(float(action.double().square().sum()) / energies[i], 1.0)
    return shares


METHOD = Sar
