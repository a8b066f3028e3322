"""Matrices of low rank, Δ = L·Rᵀ: products, norms and singular vectors without ever forming Δ.

With thin QRs L = Q_L·S and R = Q_R·T the matrix is Q_L·(S·Tᵀ)·Q_Rᵀ, and everything that a spectral
method asks for is arithmetic of the small middle matrix (the core): inner products are traces of
r × r matrices, the SVD of Δ is that of the core. All of it is done in float64.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# σ below this times σ₁ is rounding noise of float32 factors.
_NOISE = 2e-7
# Eigenvalues of a Gram matrix of unit columns below this times its size are zero.
_DEPENDENT = 1e-15


@dataclass(frozen=True, slots=True)
class Factors:
    """Δ = U·diag(σ)·Vᵀ up to its numerical rank r.

    Attributes:
        U: shape (m, r), float32 or float64.
        sigma: shape (r,), float64, largest first, on the CPU.
        V: shape (n, r), likewise.
    """

    U: Tensor
    sigma: Tensor
    V: Tensor

    @property
    def rank(self) -> int:
        """The numerical rank, 0 for a zero matrix."""
        return len(self.sigma)


@dataclass(frozen=True, slots=True)
class LowRank:
    """Δ = L·Rᵀ.

    Attributes:
        left: L, shape (m, r), float32 or float64.
        right: R, shape (n, r), likewise.
    """

    left: Tensor
    right: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of Δ."""
        return self.left.shape[0], self.right.shape[0]

    @property
    def rank(self) -> int:
        """The number of columns r; Δ may be of lower rank."""
        return self.left.shape[1]

    def block(self, rows: slice) -> Tensor:
        """Return some rows of Δ, float32, shape (b, n)."""
        return self.left[rows].to(torch.float32) @ self.right.to(torch.float32).T

    def scaled(self, factor: float) -> "LowRank":
        """Return `factor`·Δ; the shorter factor is the one that is copied."""
        if len(self.left) <= len(self.right):
            return LowRank(self.left.double() * factor, self.right)
        return LowRank(self.left, self.right.double() * factor)

    def is_finite(self) -> bool:
        """Return whether no factor holds NaN or infinity."""
        # Both ends are NaN where any number is; no mask of the factor's size is made.
        ends = [torch.stack(side.aminmax()) for side in (self.left, self.right) if side.numel()]
        return all(bool(torch.isfinite(pair).all()) for pair in ends)


def concatenated(parts: Sequence[LowRank]) -> LowRank:
    """Return ΣΔ_i, of rank Σr_i at most; float64."""
    return LowRank(
        _side_by_side([part.left for part in parts]), _side_by_side([part.right for part in parts])
    )


def _side_by_side(columns: Sequence[Tensor]) -> Tensor:
    """Return matrices beside each other in float64; none is copied twice."""
    joined = columns[0].new_empty(
        len(columns[0]), sum(one.shape[1] for one in columns), dtype=torch.float64
    )
    start = 0
    for one in columns:
        joined[:, start : start + one.shape[1]] = one
        start += one.shape[1]
    return joined


class FactorSpace:
    """N task vectors of low rank in their own coordinates, float64.

    Args:
        vectors: of one shape (m, n).

    Memory: 8·(m + n)·Σr_i bytes, and a few (Σr_i)² matrices.
    """

    def __init__(self, vectors: Sequence[LowRank]) -> None:
        self._lefts, self._rights, self._cores = [], [], []
        for vector in vectors:
            Q_L, S = torch.linalg.qr(vector.left.double())
            Q_R, T = torch.linalg.qr(vector.right.double())
            self._lefts.append(Q_L)
            self._rights.append(Q_R)
            self._cores.append(S @ T.T)
        self._svds: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
        self._lefts_crossed: dict[tuple[int, int], Tensor] = {}

    def gram(self) -> Tensor:
        """Return D, D_ij = ⟨Δ_i, Δ_j⟩, shape (N, N), on the CPU."""
        return self._gram(self._rights)

    def residual_gram(self, V: Tensor, columns: Sequence[slice]) -> Tensor:
        """Return G, G_ij = ⟨R_i, R_j⟩ of R_i = Δ_i·(I − V_i·V_iᵀ), without cancellation.

        Args:
            V: orthonormal columns V_i side by side, shape (n, c).
            columns: which of them are V_i.
        """
        V = V.double()
        rest = [
            right - V[:, own] @ (V[:, own].T @ right)
            for right, own in zip(self._rights, columns, strict=True)
        ]
        return self._gram(rest)

    def project(self, V: Tensor) -> Tensor:
        """Return Δ_j·V for all j, float64, (N, m, c): V of shape (n, c), or one each, (N, n, c)."""
        V = V.double().expand(len(self._cores), -1, -1)
        return torch.stack(
            [
                left @ (core @ (right.T @ own))
                for left, core, right, own in zip(
                    self._lefts, self._cores, self._rights, V, strict=True
                )
            ]
        )

    def project_back(self, Y: Tensor) -> Tensor:
        """Return Δ_jᵀ·Y_j for all j, float64, (N, n, c): Y of shape (N, m, c)."""
        return torch.stack(
            [
                right @ (core.T @ (left.T @ own))
                for left, core, right, own in zip(
                    self._lefts, self._cores, self._rights, Y.double(), strict=True
                )
            ]
        )

    def svd(self, i: int, keep: int | None = None) -> Factors:
        """Return the SVD of Δ_i up to its numerical rank, or its `keep` leading triplets."""
        U, sigma, V = self._core_svd(i)
        rank = numerical_rank(sigma)
        rank = rank if keep is None else min(rank, keep)
        return Factors(
            self._lefts[i] @ U[:, :rank], sigma[:rank].cpu(), self._rights[i] @ V[:, :rank]
        )

    def sigma(self, i: int) -> Tensor:
        """Return all singular values of Δ_i that its factors allow, largest first."""
        return self._core_svd(i)[1]

    def _core_svd(self, i: int) -> tuple[Tensor, Tensor, Tensor]:
        if i not in self._svds:
            U, sigma, Vh = torch.linalg.svd(self._cores[i])
            self._svds[i] = U, sigma, Vh.T
        return self._svds[i]

    def _gram(self, rights: Sequence[Tensor]) -> Tensor:
        count = len(self._cores)
        gram = torch.zeros(count, count, dtype=torch.float64)
        for i in range(count):
            for j in range(i, count):
                # ⟨Q_i·C_i·Z_iᵀ, Q_j·C_j·Z_jᵀ⟩ = tr(C_iᵀ·Q_iᵀQ_j·C_j·Z_jᵀZ_i)
                left = self._cores[i].T @ self._left_products(i, j) @ self._cores[j]
                gram[i, j] = gram[j, i] = (left * (rights[i].T @ rights[j])).sum().cpu()
        return gram

    def _left_products(self, i: int, j: int) -> Tensor:
        """Return Q_iᵀ·Q_j, which both D and G take."""
        if (i, j) not in self._lefts_crossed:
            self._lefts_crossed[i, j] = self._lefts[i].T @ self._lefts[j]
        return self._lefts_crossed[i, j]


def numerical_rank(sigma: Tensor) -> int:
    """Return how many singular values stand above the rounding noise of float32 factors."""
    return int((sigma > _NOISE * sigma[0]).sum()) if len(sigma) and float(sigma[0]) > 0 else 0


@dataclass(frozen=True, slots=True)
class CoreSvd:
    """The SVD of L·Rᵀ in the coordinates of its own factors: U = L·to_left, V = R·to_right.

    Attributes:
        to_left: shape (r, k), float64.
        sigma: shape (k,), float64, largest first.
        to_right: shape (r, k), float64.
        lengths: shape (r,), float64, of each term L_k·R_kᵀ.
    """

    to_left: Tensor
    sigma: Tensor
    to_right: Tensor
    lengths: Tensor


def core_svd(matrix: LowRank) -> CoreSvd:
    """Return the SVD of a matrix of low rank up to its numerical rank, without its vectors.

    Taken in the coordinates that the eigenvectors of both factors' Gram matrices give, columns
    scaled to length 1 before: columns that depend on others cost nothing, and the products stay
    exact to rounding whatever their condition.

    Memory: a few r × r matrices, beside the factors in float64.
    """
    grams = [side.T @ side for side in (matrix.left.double(), matrix.right.double())]
    (to_left, C_L), (to_right, C_R) = map(_basis, grams)
    U, sigma, Vh = torch.linalg.svd(C_L @ C_R.T)
    rank = numerical_rank(sigma)
    lengths = (grams[0].diagonal() * grams[1].diagonal()).clamp_min(0).sqrt()
    return CoreSvd(to_left @ U[:, :rank], sigma[:rank], to_right @ Vh[:rank].T, lengths)


def svd(matrix: LowRank) -> Factors:
    """Return the SVD of a matrix of low rank up to its numerical rank, float64.

    Memory: 8·(m + n)·r bytes twice, and a few r × r matrices.
    """
    found = core_svd(matrix)
    U, V = matrix.left.double() @ found.to_left, matrix.right.double() @ found.to_right
    return Factors(U, found.sigma.cpu(), V)


def balanced(found: Factors, rank: int | None = None) -> LowRank:
    """Return the best approximation of a rank with its weight shared evenly by both factors.

    Args:
        found: an SVD.
        rank: how many directions to keep; None keeps all.
    """
    root = found.sigma[:rank].sqrt().to(found.U)
    return LowRank(found.U[:, :rank] * root, found.V[:, :rank] * root)


def _basis(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Return T and C: Q = X·T has orthonormal columns that span those of X, and X = Q·C.

    Args:
        gram: XᵀX, float64.
    """
    lengths = gram.diagonal().clamp_min(0).sqrt()
    safe = torch.where(lengths > 0, lengths, 1.0)
    values, vectors = torch.linalg.eigh(gram / (safe[:, None] * safe))
    alive = values > _DEPENDENT * len(values) * values.max().clamp_min(1.0)
    root = values[alive].sqrt()
    vectors = vectors[:, alive]
    return vectors / (safe[:, None] * root), (vectors * root).T * lengths
