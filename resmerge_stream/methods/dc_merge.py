"""DC-Merge: bring all experts into one orthogonal cover space, elect signs there, go back.

Public code Tobeginwith/DC-Merge, full fine-tuning variant. Each expert gives its k = ⌊r/N⌋ leading
triplets; Ũ = polar([U₁ … U_N]), Ṽ likewise; Mᵢ = ŨᵀΔᵢ⁽ᵏ⁾Ṽ keeps its 0.1 % largest entries; signs
are elected on ΣMᵢ and agreeing entries averaged; only the N diagonal k × k blocks remain;
ΔW = λŨMṼᵀ. The code omits the energy smoothing that the paper's text describes; `smoothing` turns
it on: ``avg`` gives all k values their mean, ``linear`` weights from min(5, σ₁/σ_k) down to 1 with
the same sum. λ is tuned on data there; 1 here. Truncated at the numerical rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..maths.lazy import TaskVectors, Tensor, factors, torch
from .base import Site, Update, param
from .parts.election import disjoint_merge
from .parts.spectral_method import SpectralMethod, product
from .tsv_m import stacked_bytes

_STEEPEST = 5.0


@dataclass(frozen=True, kw_only=True)
class DcMerge(SpectralMethod):
    """The experts' strongest directions span a common space; there each expert keeps its largest
    coordinates, and those that agree in sign are averaged."""

    name: ClassVar[str] = "dc_merge"
    title: ClassVar[str] = "DC-Merge"
    paper: ClassVar[str] = "DC-Merge (directional consistency), full fine-tuning variant"
    url: ClassVar[str] = "https://github.com/Tobeginwith/DC-Merge"

    density: float = param(0.001, "Share of coordinates to keep", minimum=0.0, maximum=1.0)
    smoothing: str = param("none", "Balance energies first", choices=("none", "avg", "linear"))
    scale: float = param(1.0, "Factor λ of the result", minimum=-10.0, maximum=10.0)

    def merge_spectrum(self, vectors: TaskVectors, site: Site) -> Update:
        """Return λ · Ũ · M · Ṽᵀ."""
        k = min(vectors.shape) // vectors.count
        found = [factors.svd_of(vectors, i) for i in range(vectors.count)]
        widths = [min(svd.rank, k) for svd in found]
        U = torch.cat([f.U[:, :w] for f, w in zip(found, widths, strict=True)], dim=1)
        V = torch.cat([f.V[:, :w] for f, w in zip(found, widths, strict=True)], dim=1)
        root_U, root_V = factors.roots(U)[1], factors.roots(V)[1]
        coordinates, start = [], 0
        mask = torch.zeros_like(root_U, dtype=torch.bool)
        for svd, width in zip(found, widths, strict=True):
            own = slice(start, start + width)
            sigma = self._smooth(svd.sigma[:width]).to(root_U.device)
            # ŨᵀUᵢ are columns of (ÛᵀÛ)^(1/2), so M_i needs no product with Δᵢ.
            M = (root_U[:, own] * sigma) @ root_V[own]
            coordinates.append(_largest(M, self.density).float())
            mask[own, own] = True
            start += width
        weights = [1.0] * vectors.count
        merged = disjoint_merge(coordinates, weights, normalize=True, scale=self.scale)
        gates = {
            "directions": U.shape[1],
            "kept_coordinates": int(torch.count_nonzero(merged * mask)),
        }
        left = torch.matmul(factors.polar(U), merged * mask)
        return product(left, factors.polar(V), "dc_merge", gates)

    def _smooth(self, sigma: Tensor) -> Tensor:
        """Return balanced singular values with the same sum."""
        if self.smoothing == "none" or len(sigma) < 2:
            return sigma
        if self.smoothing == "avg":
            return torch.full_like(sigma, float(sigma.mean()))
        steepness = min(_STEEPEST, float(sigma[0] / sigma[-1]))
        shape = torch.linspace(steepness, 1.0, len(sigma), dtype=sigma.dtype)
        return shape * (sigma.sum() / shape.sum())

    def scratch_bytes(self, m: int, n: int, experts: int) -> int:
        """Return bytes of TSV-Merge's factors, of the coordinates, and of what is kept of them."""
        return stacked_bytes(m, n, experts) + 4 * (experts + 28) * min(m, n) ** 2


def _largest(M: Tensor, density: float) -> Tensor:
    """Return M with all but its ⌊density · numel⌋ (at least 1) largest entries set to zero."""
    if M.numel() == 0:
        return M
    count = max(int(density * M.numel()), 1)
    threshold = M.abs().flatten().kthvalue(M.numel() - count + 1).values
    return M * (M.abs() >= threshold)


METHOD = DcMerge
