"""Whole singular value decompositions, for the methods that need every direction.

Taken from the eigenvectors of the smaller Gram matrix, summed and solved in float64: for tall
matrices several times cheaper than a full SVD, and exact to about 1e-16·σ₁²/σᵢ in each direction.
Directions below 1e-6·σ₁ are dropped (numerical rank): a Gram matrix cannot resolve them below
1e-8·σ₁, and reference codes that keep LAPACK's arbitrary null vectors change their result by them.
"""

import torch
from torch import Tensor

from ..memory import DOUBLE_UP_TO
from .low_rank import Factors, concatenated, svd
from .products import CHUNK
from .task_vectors import TaskVectors

# σ below this times σ₁ counts as zero.
RANK_TOLERANCE = 1e-6


def svd_of(vectors: TaskVectors, i: int) -> Factors:
    """Return the SVD of Δ_i, computed once for all methods that ask."""
    return vectors.factored_svd(i) or vectors.once(("svd", i), lambda: thin_svd(vectors.matrix(i)))


def svd_of_sum(vectors: TaskVectors) -> Factors:
    """Return the SVD of ΣΔ_i, computed once for all methods that ask."""
    factors = vectors.low_rank
    if factors is not None:
        return vectors.once("svd of sum", lambda: svd(concatenated(factors)))
    return vectors.once("svd of sum", lambda: thin_svd(total(vectors)))


def total(vectors: TaskVectors) -> Tensor:
    """Return ΣΔ_i, float32, shape (m, n)."""
    result = torch.empty(vectors.shape, device=vectors.device)
    for rows in vectors.blocks():
        result[rows] = vectors.stack(rows).sum(0, dtype=torch.float64)
    return result


def thin_svd(matrix: Tensor, keep: int | None = None) -> Factors:
    """Return the SVD of a matrix up to its numerical rank, or its `keep` leading triplets.

    Args:
        matrix: shape (m, n), float32 or float64; a zero matrix gives rank 0.
        keep: how many triplets to compute vectors of; None for all.

    Memory: `memory.svd_bytes`.
    """
    m, n = matrix.shape
    tall = m >= n
    values, vectors = torch.linalg.eigh(_gram(matrix if tall else matrix.T))
    sigma = values.clamp_min(0).sqrt().flip(0).cpu()
    largest = float(sigma[0]) if len(sigma) else 0.0
    rank = int((sigma > RANK_TOLERANCE * largest).sum()) if largest > 0 else 0
    rank = min(rank, keep) if keep is not None else rank
    short = vectors[:, len(vectors) - rank :].flip(1)
    # σ from the product itself is more exact than from the Gram matrix; so are unit columns.
    long = _times(matrix if tall else matrix.T, short)
    norms = torch.linalg.vector_norm(long, dim=0)
    long.div_(norms.clamp_min(1e-300))
    kind = torch.float64 if min(m, n) <= DOUBLE_UP_TO else torch.float32
    left, right = (long, short) if tall else (short, long)
    return Factors(left.to(kind).contiguous(), norms.cpu(), right.to(kind).contiguous())


def singular_values(matrix: Tensor) -> Tensor:
    """Return all singular values, float64, largest first, on the CPU; zeros below the rank.

    Args:
        matrix: shape (m, n), float32.
    """
    m, n = matrix.shape
    values = torch.linalg.eigvalsh(_gram(matrix if m >= n else matrix.T))
    sigma = values.clamp_min(0).sqrt().flip(0).cpu()
    largest = sigma.max() if len(sigma) else 0.0
    return torch.where(sigma > RANK_TOLERANCE * largest, sigma, 0.0)


def polar(columns: Tensor) -> Tensor:
    """Return the nearest matrix with orthonormal columns, A·(AᵀA)^(−1/2), float32, shape (m, K).

    Directions of A below the numerical rank are left out, not filled with null vectors.

    Args:
        columns: A, shape (m, K), float32 or float64.
    """
    return _times(columns, roots(columns)[0]).float()


def roots(columns: Tensor) -> tuple[Tensor, Tensor]:
    """Return (AᵀA)^(−1/2) and (AᵀA)^(1/2), float64, shape (K, K); as `polar`."""
    values, vectors = torch.linalg.eigh(_gram(columns))
    root = values.clamp_min(0).sqrt()
    alive = root > RANK_TOLERANCE * root.max() if len(root) else root > 0
    inverse = torch.where(alive, 1 / root.clamp_min(1e-300), 0.0)
    return (vectors * inverse) @ vectors.T, (vectors * torch.where(alive, root, 0.0)) @ vectors.T


def _gram(tall: Tensor) -> Tensor:
    """Return AᵀA in float64, by chunks of rows."""
    gram = torch.zeros(tall.shape[1], tall.shape[1], dtype=torch.float64, device=tall.device)
    for start in range(0, len(tall), 4 * CHUNK):
        rows = tall[start : start + 4 * CHUNK].double()
        gram.addmm_(rows.T, rows)
    return gram


def _times(tall: Tensor, short: Tensor) -> Tensor:
    """Return A·X in float64, by chunks of rows."""
    result = torch.empty(len(tall), short.shape[1], dtype=torch.float64, device=tall.device)
    for start in range(0, len(tall), 4 * CHUNK):
        result[start : start + 4 * CHUNK] = tall[start : start + 4 * CHUNK].double() @ short
    return result
