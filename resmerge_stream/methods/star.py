"""STAR: cut each expert's spectrum, scale what is left back to the full nuclear norm, average.

Lee et al. 2025, https://arxiv.org/abs/2502.10339; public code IBM/STAR. Per expert keep the fewest
leading σ whose sum reaches η % of Σσ, multiply them by Σσ / Σ(kept σ), and average the experts.
η = 40. IBM's code does this on LoRA target matrices only; here on every matrix.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..maths.lazy import TaskVectors, factors, torch
from ..memory import svd_bytes
from .base import Site, Update, param
from .parts.spectral_method import SpectralMethod, product


@dataclass(frozen=True, kw_only=True)
class Star(SpectralMethod):
    """Each expert keeps its strongest directions, enlarged to carry what the weak ones did; the
    experts are averaged."""

    name: ClassVar[str] = "star"
    title: ClassVar[str] = "STAR"
    paper: ClassVar[str] = "Lee et al. 2025, STAR: spectral truncation and rescale"
    url: ClassVar[str] = "https://arxiv.org/abs/2502.10339"

    eta: float = param(40.0, "Share of the nuclear norm to keep, in %", minimum=0.0, maximum=100.0)
    scale: float = param(1.0, "Factor of the result", minimum=-10.0, maximum=10.0)

    def merge_spectrum(self, vectors: TaskVectors, site: Site) -> Update:
        """Return (1/N) Σ Uᵢ diag(kept σ · Σσ/Σkept) Vᵢᵀ."""
        lefts, rights, kept = [], [], []
        for i in range(vectors.count):
            svd = factors.svd_of(vectors, i)
            cumulative = svd.sigma.cumsum(0)
            if svd.rank == 0:
                kept.append(0)
                continue
            nuclear = float(cumulative[-1])
            below = int((cumulative < self.eta / 100 * nuclear).sum())
            count = min(below + 1, svd.rank)
            growth = self.scale * nuclear / float(cumulative[count - 1]) / vectors.count
            sigma = (svd.sigma[:count] * growth).to(svd.U.device)
            lefts.append((svd.U[:, :count] * sigma).float())
            rights.append(svd.V[:, :count].float())
            kept.append(count)
        return product(torch.cat(lefts, 1), torch.cat(rights, 1), "star", {"kept_ranks": kept})

    def scratch_bytes(self, m: int, n: int, experts: int) -> int:
        """Return bytes of N SVDs and of the kept parts side by side."""
        return svd_bytes(m, n, experts) + experts * 8 * (m + n) * min(m, n)


METHOD = Star
