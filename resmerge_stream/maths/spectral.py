"""The k leading singular triplets of a matrix, with a certified residual.

`lanczos` is a block Lanczos iteration on ΔᵀΔ (or ΔΔᵀ, whichever is smaller) with full
reorthogonalisation: float32 products summed in float64, the projected problem in float64. In exact
arithmetic it builds the Krylov space of Golub–Kahan bidiagonalisation (Golub & Kahan 1965), keeping
the vectors of the short side only (Simon & Zha 2000 show that one side is enough).
Its head's error against a float64 SVD, 4864 × 896: 1.2e-7 at σ₁/σ₂ = 3, 5.6e-7 at 1.02, 1.1e-6 at
1.002. Weighed, not built: Lanczos on a float32 Gram matrix (72 ms a matrix on one core, for some 65
that its steps would save). `dense` is LAPACK's SVD in float64. `auto` takes the dense one for small
matrices, and where Lanczos has not converged by the time that it would have paid, the eigenvectors
of the float64 Gram matrix.
"""

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from ..memory import BLOCK_ELEMENTS, DENSE_UP_TO, GRAM_UP_TO
from .low_rank import Factors
from .products import (
    BREAKDOWN,
    CHUNK,
    frobenius_norm,
    krylov_steps,
    matmul,
    orthonormal_columns,
    orthonormal_rows,
    precise_gram_product,
    transposed_matmul,
)

# Converged: what the head's angle changes in the head is below this times the rest of the update…
UPDATE_TOLERANCE = 3e-6
# …or, where no gap determines the angle, the residual is below this times σ₁².
TOLERANCE = 1e-7
# Above this share of energy the float32 noise of the head shows in the update: refine it.
REFINE_ABOVE = 0.3


@dataclass(frozen=True, slots=True)
class Head:
    """The spectral head H = Δ V Vᵀ of a matrix Δ (m × n).

    Attributes:
        V: right singular vectors, shape (n, k), float64, orthonormal columns; a column is zero
            where Δ has no such direction.
        sigma: singular values, largest first.
        solver: ``lanczos``, ``gram``, ``dense``, ``krylov`` for a fixed number of steps, or
            ``factors`` where Δ was given as L·Rᵀ.
        steps: steps taken, 0 for dense.
        residual: max over the k of ‖Δᵀu − σv‖ / σ₁, measured, in float32 products; 0 for
            ``factors``, whose float64 SVD leaves nothing to measure.
        gap: estimate of σ_k / σ_{k+1}; infinite where nothing follows.
    """

    V: Tensor
    sigma: tuple[float, ...]
    solver: str
    steps: int
    residual: float
    gap: float


def top_singular(
    delta: Tensor,
    rank: int,
    *,
    solver: str = "auto",
    energy: float | None = None,
    alone: AbstractContextManager[object] | None = None,
) -> Head:
    """Return the leading `rank` singular triplets of a matrix.

    Args:
        delta: Δ, shape (m, n), float32, not all zero, finite, any device.
        rank: k ≥ 1; more than min(m, n) means min(m, n).
        solver: ``auto``, ``lanczos`` or ``dense``.
        energy: ‖Δ‖² where it is known already.
        alone: held during the fallback, so that threads do not pay its memory twice.

    Memory: Lanczos keeps (steps · k) × min(m, n) float32 beside Δ; the Gram matrix and its
    eigenvectors take 32 · min(m, n)² bytes; dense keeps three float64 copies of Δ.
    """
    m, n = delta.shape
    short = min(m, n)
    rank = min(rank, short)
    if solver == "dense" or (solver == "auto" and short <= max(DENSE_UP_TO, 4 * rank)):
        return _dense(delta, rank)
    patience = max((8 + short // 6) // rank, 2)
    norm = frobenius_norm(delta) if energy is None else math.sqrt(energy)
    if solver == "auto" and short <= GRAM_UP_TO:
        head = _lanczos(delta, rank, norm, patience, patience)
        if head is not None:
            return head
        with alone or nullcontext():
            return _gram(delta, rank)
    head = _lanczos(delta, rank, norm, patience, max(short // rank, 2))
    return head if head is not None else _dense(delta, rank)


def head_from_factors(factors: Factors, rank: int) -> Head:
    """Return the head of a matrix whose SVD is known.

    Args:
        factors: the SVD up to the numerical rank.
        rank: k; directions that the matrix does not have are zero.
    """
    count = min(rank, factors.rank)
    V = factors.V.new_zeros(factors.V.shape[0], rank, dtype=torch.float64)
    V[:, :count] = factors.V[:, :count]
    sigma = [*factors.sigma[:count].tolist(), *[0.0] * (rank - count)]
    following = float(factors.sigma[rank]) if factors.rank > rank else 0.0
    gap = sigma[-1] / following if following > 0 else math.inf
    return Head(V, tuple(sigma), "factors", 0, 0.0, gap)


def _lanczos(delta: Tensor, rank: int, norm: float, patience: int, max_steps: int) -> Head | None:
    """Return the head, or None when `max_steps` do not suffice.

    After `patience` steps a small residual is enough, however small the gap: then the head is not
    unique to float32's resolution, and the gap says so.
    """
    short = min(delta.shape)
    # Products with the matrix scaled by a power of two neither overflow nor underflow.
    scale = 2.0 ** math.frexp(norm)[1]
    energy = (norm / scale) ** 2
    V = torch.empty(patience * rank, short, dtype=torch.float32, device=delta.device)
    # On the device as well: nothing has to be waited for until it is looked at.
    T = torch.zeros(patience * rank, patience * rank, dtype=torch.float64, device=delta.device)
    block, step, check = start_rows(short, rank, delta.device), 0, 4
    while step < max_steps:
        stop = min(check, max_steps)
        while stop * rank >= len(V):
            room = len(V)
            T_larger = T.new_zeros(2 * room, 2 * room)
            T_larger[:room, :room] = T
            V, T = torch.cat([V, torch.empty_like(V)]), T_larger
        block, beta = krylov_steps(delta, scale, V, T, block, step, stop)
        step, check = stop, stop + max(2, stop // 12)
        strict = step < patience or patience == max_steps
        size = step * rank
        found = _converged(T[:size, :size], beta, rank, energy, strict=strict)
        if found is not None:
            values, vectors = found
            basis = V[:size]
            top = (vectors[:, -rank:].to(basis).T @ basis).T.flip(1)
            if float(values[-rank:].sum()) > REFINE_ABOVE * energy:
                top = _refined(delta, scale, top, basis, values, vectors, energy)
            V_top = _right_vectors(delta, top)
            following = float(values[-rank - 1]) if len(values) > rank else 0.0
            gap = math.sqrt(float(values[-rank]) / following) if following > 0 else math.inf
            return _head(delta, V_top, "lanczos", step, gap)
    return None


def _refined(
    delta: Tensor,
    scale: float,
    top: Tensor,
    basis: Tensor,
    values: Tensor,
    vectors: Tensor,
    energy: float,
) -> Tensor:
    """Return the Ritz vectors, float64, after one correction by their residual in float64.

    Inside the Krylov space the correction is exact to first order, outside it the spectrum is
    taken as flat. It removes the noise that the float32 products left.
    """
    rank = top.shape[1]
    ritz = (vectors.T.to(basis.device) @ basis.double()).T  # (short, j), all Ritz vectors
    level = max(energy - float(values.sum()), 0.0) / max(top.shape[0] - len(values), 1)
    images = precise_gram_product(delta, top.double() / scale) / scale
    refined = []
    for j, value in enumerate(values[-rank:].flip(0).tolist()):
        column = top[:, j].double()
        residual = images[:, j] - value * column
        inside = ritz.T @ residual
        denominators = value - values.to(inside.device)
        denominators[-rank:] = math.inf  # rotations inside the head change nothing
        outside = residual - ritz @ inside
        refined.append(column + ritz @ (inside / denominators) + outside / (value - level))
    return torch.stack(refined, dim=1)


def _right_vectors(delta: Tensor, short_vectors: Tensor) -> Tensor:
    """Return V, float64, from vectors of the short side: right ones, or left ones if m < n."""
    m, n = delta.shape
    if m >= n:
        return orthonormal_columns(short_vectors)
    if short_vectors.dtype == torch.float32:
        return orthonormal_columns(transposed_matmul(delta, short_vectors))
    V = torch.zeros(n, short_vectors.shape[1], dtype=torch.float64, device=delta.device)
    step = max(BLOCK_ELEMENTS // n, 1)
    for start in range(0, m, step):
        rows = slice(start, start + step)
        V += delta[rows].double().T @ short_vectors[rows]
    return orthonormal_columns(V)


def _converged(
    T: Tensor, beta: Tensor, rank: int, energy: float, *, strict: bool
) -> tuple[Tensor, Tensor] | None:
    """Return all eigenvalues and eigenvectors of the projected problem once the update is exact.

    The residual of a Ritz pair is ‖β·s‖ with s the last entries of its eigenvector; divided by the
    gap it bounds the head's angle θ, and √2·σ₁·θ what that changes in the head (docs/paper.md).

    Args:
        T, beta: the projected problem, and what the next step would add.
        rank: k.
        energy: ‖Δ‖².
        strict: whether the angle counts, or the residual alone.
    """
    T, beta = T.cpu(), beta.cpu()
    values, vectors = torch.linalg.eigh(torch.tril(T) + torch.tril(T, -1).T)
    first, kth = float(values[-1]), float(values[-rank])
    if first <= 0:
        return None
    residual = float(torch.linalg.vector_norm(beta @ vectors[-rank:, -rank:], dim=0).max())
    following = float(values[-rank - 1]) if len(values) > rank else 0.0
    rest = math.sqrt(max(energy - float(values[-rank:].sum()), 0.0) / first)
    angle = UPDATE_TOLERANCE * min(max(rest, 0.1), 20.0)
    allowed = angle * max(kth - following, 1e-12 * first) if strict else TOLERANCE * first
    exhausted = float(torch.linalg.vector_norm(beta)) <= BREAKDOWN * first
    return (values, vectors) if exhausted or residual <= allowed else None


def _gram(delta: Tensor, rank: int) -> Head:
    """Return the head from the eigenvectors of the smaller Gram matrix, summed in float64."""
    m, n = delta.shape
    wide = delta if m < n else delta.T
    gram = torch.zeros(len(wide), len(wide), dtype=torch.float64, device=delta.device)
    for start in range(0, wide.shape[1], 2 * CHUNK):
        columns = wide[:, start : start + 2 * CHUNK].double()
        gram.addmm_(columns, columns.T)
    values, vectors = torch.linalg.eigh(gram)
    top = vectors[:, -rank:].flip(1).contiguous()
    V = _right_vectors(delta, top)
    following = float(values[-rank - 1]) if len(values) > rank else 0.0
    gap = math.sqrt(float(values[-rank]) / following) if following > 0 else math.inf
    return _head(delta, V, "gram", 0, gap)


def _dense(delta: Tensor, rank: int) -> Head:
    _, sigma, Vh = torch.linalg.svd(delta.double(), full_matrices=False)
    following = float(sigma[rank]) if rank < len(sigma) else 0.0
    gap = float(sigma[rank - 1]) / following if following > 0 else math.inf
    V = Vh[:rank].T.contiguous()
    V[:, sigma[:rank] <= BREAKDOWN * sigma[0]] = 0
    return _head(delta, V, "dense", 0, gap)


def _head(delta: Tensor, V: Tensor, solver: str, steps: int, gap: float) -> Head:
    right = V.to(torch.float32)
    U_sigma = matmul(delta, right)
    sigma = torch.linalg.vector_norm(U_sigma, dim=0, dtype=torch.float64)
    safe = torch.where(sigma > 0, sigma, torch.ones_like(sigma)).float()
    back = transposed_matmul(delta, U_sigma / safe) - right * sigma.float()
    residual = torch.linalg.vector_norm(back, dim=0, dtype=torch.float64).max()
    first = float(sigma.max())
    return Head(
        V,
        tuple(sorted(sigma.tolist(), reverse=True)),
        solver,
        steps,
        float(residual) / first if first > 0 else 0.0,
        gap,
    )


def start_rows(size: int, rank: int, device: torch.device) -> Tensor:
    """Return orthonormal start rows, float32, shape (rank, size), that depend on it only."""
    generator = torch.Generator().manual_seed(0x5EED)
    rows = torch.randn(rank, size, generator=generator, dtype=torch.float32)
    return orthonormal_rows(rows)[0].to(device)
