"""OPCM: merge one expert after another, each without what would disturb the ones before.

Tang et al. 2025, https://arxiv.org/abs/2501.09522; public code fusion_bench ``opcm``. M starts as
Δ₁. For each next Δ: M = USVᵀ; s counts the leading σ whose cumulated share is at most α; in the
coordinates P = UᵀΔV the diagonal and the leading s × s block are removed from Δ; M takes the rest.
At the end M is scaled to the experts' mean norm, both norms over the whole model (one counting
pass; the code's λ after every step comes to the same). The result depends on the experts' order,
which is the recipe's (the code shuffles). U and V stop at the numerical rank.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from ..maths.lazy import TaskVectors, Tensor, factors, torch
from ..memory import svd_bytes
from .base import OTHER_CHOICES, Counter, Site, Update, param
from .parts.elementwise import linear
from .parts.spectral_method import SpectralMethod


@dataclass(frozen=True, kw_only=True)
class Opcm(SpectralMethod):
    """The experts are merged in order; each adds only what lies outside the main directions of
    what is merged already, and the result gets the experts' mean length."""

    name: ClassVar[str] = "opcm"
    title: ClassVar[str] = "OPCM"
    paper: ClassVar[str] = "Tang et al. 2025, Merging models on the fly (OPCM)"
    url: ClassVar[str] = "https://arxiv.org/abs/2501.09522"

    other: str = param("sum", "Rule of tensors without SVD", choices=OTHER_CHOICES)
    alpha: float = param(0.5, "Share of σ that is protected", minimum=0.0, maximum=1.0)
    scale: float = param(1.0, "Factor of the result", minimum=-10.0, maximum=10.0)

    def counting_passes(self) -> int:
        """Return 1: the norms of the whole model."""
        return 1

    def counter(self, number: int, counted: Mapping[str, Any], experts: int) -> Counter:
        """Return the counter of ‖Δᵢ‖² and ‖M‖²."""
        return _SquaredNorms(self, experts)

    def merge(self, vectors: TaskVectors, site: Site) -> Update:
        """Merge a matrix by its chain; ``sum`` tensors get the same factor, as in the code."""
        if site.rule.needs_matrix:
            return self.merge_spectrum(vectors, site)
        sum_factor = self._factor(site)
        coefficient = {"mean": 1 / vectors.count, "sum": sum_factor, "base": 0.0}[self.other]
        return linear([coefficient] * vectors.count, self.other)

    def merge_spectrum(self, vectors: TaskVectors, site: Site) -> Update:
        """Return M with the factor that the whole model's norms call for."""
        factor = self._factor(site)
        M = self.chain(vectors)

        def rows(block: slice, stack: Tensor) -> Tensor:
            return M[block] * factor

        return Update(rows, "opcm", {"global_factor": factor})

    def chain(self, vectors: TaskVectors) -> Tensor:
        """Return M before the scaling, float32, shape (m, n)."""
        M = vectors.matrix(0).clone()
        for i in range(1, vectors.count):
            svd = factors.thin_svd(M)
            delta = vectors.matrix(i)
            M += delta
            if svd.rank == 0:
                continue
            share = svd.sigma.cumsum(0) / svd.sigma.sum()
            protected = int((share <= self.alpha).sum())
            U, V = svd.U.float(), svd.V.float()
            P = U.T @ delta @ V
            removed = torch.diag(P.diagonal().clone())
            removed[:protected, :protected] = P[:protected, :protected]
            M.addmm_(U @ removed, V.T, alpha=-1.0)
        return M

    def scratch_bytes(self, m: int, n: int, experts: int) -> int:
        """Return bytes of M, its SVD, and the projections."""
        short = min(m, n)
        return 8 * m * n + svd_bytes(m, n) + 8 * (m + n) * short + 12 * short**2

    def _factor(self, site: Site) -> float:
        merged = math.sqrt(site.counted["opcm_merged_sq"])
        norms = [math.sqrt(square) for square in site.counted["opcm_norms_sq"]]
        return self.scale * sum(norms) / len(norms) / merged if merged > 0 else 0.0


class _SquaredNorms:
    """Adds up ‖Δᵢ‖² and ‖M‖² over the tensors that M is made of."""

    def __init__(self, method: Opcm, experts: int) -> None:
        self._method = method
        self._norms: list[list[float]] = [[] for _ in range(experts)]
        self._merged: list[float] = []

    def add(self, vectors: TaskVectors, site: Site) -> None:
        """Merge a matrix and keep its norm; a sum of vectors likewise."""
        if vectors.is_zero() or (not site.rule.needs_matrix and self._method.other != "sum"):
            return
        D = vectors.gram()
        for i, square in zip(site.experts, D.diagonal().tolist(), strict=True):
            self._norms[i].append(square)
        if site.rule.needs_matrix:
            M = self._method.chain(vectors)
            norm = float(torch.linalg.vector_norm(M, dtype=torch.float64))
            self._merged.append(norm * norm)
        else:
            self._merged.append(max(float(D.sum()), 0.0))

    def result(self) -> dict[str, Any]:
        """Return the sums, rounded once: the order of `add` does not matter."""
        return {
            "opcm_norms_sq": [math.fsum(squares) for squares in self._norms],
            "opcm_merged_sq": math.fsum(self._merged),
        }


METHOD = Opcm
