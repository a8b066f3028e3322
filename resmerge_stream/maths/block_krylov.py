"""Leading directions of all task vectors of a matrix, by a fixed number of block Krylov steps.

With Ω (n × k) from a fixed seed, q steps span K = [ΔΩ, (ΔΔᵀ)ΔΩ, …, (ΔΔᵀ)^(q−1)ΔΩ]. With Q an
orthonormal basis of K the directions are the k leading right singular vectors of QᵀΔ (Musco & Musco
2015, https://arxiv.org/abs/1504.05477): what they are depends on Δ, k and q alone, and no gap in
the spectrum decides how long it takes. Task vectors are read by row blocks, 2q times.
"""

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from ..memory import BLOCK_ELEMENTS
from .spectral import Head, start_rows
from .task_vectors import TaskVectors

# A step that adds less than this, relative to what it made, has found nothing but rounding noise.
_NOTHING_NEW = 1e-5
# Directions below this times σ₁ are left out.
_NO_DIRECTION = 1e-6


def krylov_heads(vectors: TaskVectors, rank: int, steps: int) -> list[Head]:
    """Return the head of every Δ_i from block Krylov steps, computed once for all who ask.

    Args:
        vectors: of one matrix.
        rank: k; more than min(m, n) means min(m, n).
        steps: q ≥ 1.

    Returns:
        V has zero columns where Δ_i has no such direction. σ are the singular values of QᵀΔ_i, no
        larger than ‖Δ_i·v‖, which `measured` puts in their place.

    Memory: `memory.krylov_bytes`.
    """
    return vectors.once(("steps", rank, steps), lambda: _heads(vectors, rank, steps))


def measured(head: Head, action: Tensor) -> Head:
    """Return a head with what its directions turned out to do.

    Args:
        head: from `krylov_heads`.
        action: Δ·V, shape (m, k).

    Returns:
        σ are the norms ‖Δ·v‖; the residual is the largest ‖Δ·v − σu‖, relative to σ₁.
    """
    lengths = torch.linalg.vector_norm(action, dim=0, dtype=torch.float64).tolist()
    first = max(lengths)
    # u = Q·w has Δᵀu = σv, so that ⟨u, Δv⟩ = σ and ‖Δv − σu‖² = ‖Δv‖² − σ².
    rest = max(a * a - b * b for a, b in zip(lengths, head.sigma, strict=True))
    residual = math.sqrt(max(rest, 0.0)) / first if first > 0 else 0.0
    return replace(head, sigma=tuple(sorted(lengths, reverse=True)), residual=residual)


def _heads(vectors: TaskVectors, rank: int, steps: int) -> list[Head]:
    m, n = vectors.shape
    rank, count = min(rank, m, n), vectors.count
    # One block's products are as quick in float64; factors have no others.
    exact = vectors.low_rank is not None or m * n <= BLOCK_ELEMENTS
    dtype = torch.float64 if exact else torch.float32
    start = start_rows(n, rank, vectors.device).T.to(dtype)
    bases = torch.zeros(count, m, steps * rank, dtype=torch.float64, device=start.device)
    images = bases.new_zeros(count, n, steps * rank)
    columns = start.expand(count, -1, -1)
    for step in range(steps):
        done, own = slice(0, step * rank), slice(step * rank, (step + 1) * rank)
        left = vectors.project(columns)
        bases[:, :, own] = _orthonormal(vectors, left, bases[:, :, done])
        if not bases[:, :, own].any():
            break
        images[:, :, own] = vectors.project_back(bases[:, :, own].to(dtype))
        if step + 1 < steps:
            columns = _orthonormal(vectors, images[:, :, own], images[:, :, :0]).to(dtype)
    return [_head(image, rank, steps) for image in images]


def _orthonormal(vectors: TaskVectors, columns: Tensor, bases: Tensor) -> Tensor:
    """Return orthonormal columns of what all have beside their bases, zeros for the rest."""

    def job(i: int) -> Callable[[], Tensor]:
        return lambda: _new_directions(columns[i], bases[i])

    return torch.stack(vectors.cores.each([job(i) for i in range(len(columns))]))


def _new_directions(columns: Tensor, basis: Tensor) -> Tensor:
    rest = columns.double()
    size = float(torch.linalg.vector_norm(rest))
    for _ in range(2):
        rest = rest - basis @ (basis.T @ rest)
    # Twice: what is nearly dependent comes out with the Gram matrix's own rounding.
    for least in ((_NOTHING_NEW * size) ** 2, 0.5):
        values, vectors = torch.linalg.eigh(rest.T @ rest)
        alive = values > least
        rest = rest @ torch.where(alive, vectors / torch.where(alive, values, 1.0).sqrt(), 0.0)
    return rest


def _head(image: Tensor, rank: int, steps: int) -> Head:
    """Return the head of Δ from ΔᵀQ, shape (n, q·k), float64."""
    values, vectors = torch.linalg.eigh(image.T @ image)
    sigma = values.clamp_min(0).sqrt().flip(0)
    alive = sigma[:rank] > _NO_DIRECTION * sigma[0]
    V = image @ (vectors.flip(1)[:, :rank] * torch.where(alive, 1 / sigma[:rank], 0.0))
    strengths = sigma[: rank + 1].tolist()
    following = strengths[rank] if len(strengths) > rank else 0.0
    gap = strengths[rank - 1] / following if following > 0 else math.inf
    return Head(V, tuple(strengths[:rank]), "krylov", steps, 0.0, gap)
