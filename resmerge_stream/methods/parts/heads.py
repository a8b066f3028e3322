"""Heads of task vectors, and what is left without them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ...maths.lazy import TaskVectors, Tensor, spectral, torch

# With more of ‖Δ‖² than this in a head, differences Δ − H lose digits in float32: use float64.
_PRECISE_ABOVE = 0.5


# Rows that are converted to float64 at once.
_PRECISE_ROWS = 32


def head_of(vectors: TaskVectors, i: int, rank: int, solver: str, energy: float) -> spectral.Head:
    """Return the head of Δ_i with ‖Δ_i‖² = `energy`, found once for all methods that ask."""
    # One more than the head has: the gap to it is reported.
    factors = vectors.factored_svd(i, keep=rank + 1)
    if factors is not None:
        return spectral.head_from_factors(factors, min(rank, *vectors.shape))

    def find() -> spectral.Head:
        delta = vectors.matrix(i)
        return spectral.top_singular(delta, rank, solver=solver, energy=energy, alone=vectors.alone)

    return vectors.once(("head", i, rank, solver), find)


def heads_of(
    vectors: TaskVectors, rank: int, energies: Sequence[float], solver: str = "auto"
) -> list[spectral.Head | None]:
    """Return the head of every Δ_i (paper Eq. 6), None where Δ_i is zero.

    Args:
        vectors: of one matrix; where all lie in memory, idle cores find heads of their own.
        rank: k.
        energies: ‖Δ_i‖².
        solver: as `top_singular` takes it.
    """

    def job(i: int, energy: float) -> Callable[[], spectral.Head | None]:
        return lambda: head_of(vectors, i, rank, solver, energy) if energy > 0 else None

    jobs = [job(i, energy) for i, energy in enumerate(energies)]
    if vectors.are_whole and solver != "dense":
        return vectors.cores.each(jobs)
    return [find() for find in jobs]


def head_report(heads: Sequence[spectral.Head | None], rank: int) -> dict[str, Any]:
    """Return what the report keeps about heads and how they were found; at least one is there."""
    found = [head for head in heads if head is not None]
    return {
        "rank": rank,
        "sigma": [list(head.sigma) if head else [] for head in heads],
        "gap": [min(head.gap, 1e12) if head else None for head in heads],
        "solver": {
            "name": "+".join(sorted({head.solver for head in found})),
            "steps": max(head.steps for head in found),
            "residual": max(head.residual for head in found),
        },
    }


def not_unique(heads: list[spectral.Head | None]) -> tuple[str, ...]:
    """Return a warning where float32 does not tell the last direction from the next."""
    unresolved = [i for i, head in enumerate(heads) if head is not None and head.gap < 1 + 1e-6]
    if not unresolved:
        return ()
    experts = ", ".join(str(i + 1) for i in unresolved)
    return (f"the head of expert {experts} is not unique: σ_k and σ_(k+1) agree to 1e-6",)


def project_heads(
    vectors: TaskVectors, heads: list[spectral.Head | None], D: Tensor
) -> tuple[Tensor, Tensor]:
    """Return V of shape (n, N·k) and Y_j = Δ_j V of shape (N, m, N·k).

    Both are float64 where a head holds most of an update or all updates are factors, else float32.
    """
    found = [(i, head) for i, head in enumerate(heads) if head is not None]
    width = max(head.V.shape[1] for _, head in found)
    V = found[0][1].V.new_zeros(vectors.shape[1], len(heads) * width)
    for i, head in found:
        V[:, i * width : i * width + head.V.shape[1]] = head.V
    share = max(sum(s * s for s in head.sigma) / float(D[i, i]) for i, head in found)
    if share <= _PRECISE_ABOVE and vectors.low_rank is None:
        V = V.to(torch.float32)
    return V, vectors.project(V)


def residual_gram(
    vectors: TaskVectors, D: Tensor, V: Tensor, Y: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return P, Q and G of the heads H_i = Y_ii V_iᵀ; float64, shape (N, N), CPU.

    Args:
        vectors: the task vectors.
        D: their Gram matrix.
        V: right singular vectors of all experts, shape (n, N·k).
        Y: Δ_j·V for all j, shape (N, m, N·k); float64 asks for G without cancellation.
    """
    count = vectors.count
    k = V.shape[1] // count
    columns = [slice(i * k, (i + 1) * k) for i in range(count)]
    H_left = [Y[i, :, columns[i]].double() for i in range(count)]
    VtV = (V.double().T @ V.double()).cpu()
    P = torch.zeros(count, count, dtype=torch.float64)
    Q = torch.zeros(count, count, dtype=torch.float64)
    for i in range(count):
        for j in range(count):
            P[i, j] = (H_left[i] * Y[j, :, columns[i]]).sum()
            inner = (H_left[i].T @ H_left[j]).cpu()
            Q[i, j] = (inner * VtV[columns[i], columns[j]]).sum()
    if vectors.space is not None:
        return P, Q, vectors.space.residual_gram(V, columns)
    if V.dtype == torch.float64:
        return P, Q, _residual_gram_by_blocks(vectors, V, Y, columns)
    return P, Q, D - P - P.T + Q


def _residual_gram_by_blocks(
    vectors: TaskVectors, V: Tensor, Y: Tensor, columns: list[slice]
) -> Tensor:
    """Return G from the residuals themselves, block by block in float64: no cancellation."""
    G = torch.zeros(vectors.count, vectors.count, dtype=torch.float64)
    for rows in vectors.blocks():
        stack, left = vectors.stack(rows), Y[:, rows]
        for start in range(0, stack.shape[1], _PRECISE_ROWS):
            part = slice(start, start + _PRECISE_ROWS)
            residuals = [
                stack[i, part].double() - left[i, part, own] @ V[:, own].T
                for i, own in enumerate(columns)
            ]
            flat = torch.stack(residuals).flatten(1)
            G += (flat @ flat.T).cpu()
    return G
