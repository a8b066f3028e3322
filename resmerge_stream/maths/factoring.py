"""An update as the factors of an adapter: the best of a rank, how much of it that is, the cast."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .low_rank import Factors, LowRank, balanced, concatenated, svd
from .rounding import Kept
from .spectral import top_singular

# Rows of a whole update that are multiplied with its factors at once.
_ROWS = 1024
Place = tuple[slice, slice]


@dataclass(frozen=True, slots=True)
class Fitted:
    """An update as L·Rᵀ.

    Attributes:
        factors: of the rank that was asked for, as they are stored; zero columns where the update
            is of lower rank.
        kept: what the stored factors keep of the update; every element counts as changed.
        shares: of ‖ΔW‖² by rank, before the cast: what the best factors of rank 1, 2, 4, … would
            hold, and last those of this rank; 1 for a zero update.
        needed: the rank that the factors have: columns beyond it are zero.
    """

    factors: LowRank
    kept: Kept
    shares: Mapping[int, float]
    needed: int


def fitted(
    shape: tuple[int, int],
    parts: Sequence[tuple[Place, Factors | LowRank | Tensor]],
    rank: int,
    dtype: torch.dtype,
) -> Fitted:
    """Return the best approximation of an update of a rank.

    Args:
        shape: of the update, (m, n).
        parts: the update's parts, where they lie in it: as an SVD, as factors, or as float32
            values.
        rank: r ≥ 1.
        dtype: of the factors as they are stored.

    Memory: of factors 16·(m + n)·Σr bytes; of values 4·m·n bytes and what `top_singular` takes.
    """
    if not parts:
        return _nothing(shape, rank, dtype)
    only = parts[0][1]
    if len(parts) == 1 and isinstance(only, Factors):
        return _of_svd(only, shape, rank, dtype)
    given = [(place, balanced(p) if isinstance(p, Factors) else p) for place, p in parts]
    factored = [(place, part) for place, part in given if isinstance(part, LowRank)]
    if len(factored) == len(given):
        found = svd(concatenated([_placed(shape, *one) for one in factored]))
        return _of_svd(found, shape, rank, dtype)
    whole = only
    if not isinstance(whole, Tensor) or whole.shape != shape:
        whole = torch.zeros(shape)
        for place, part in given:
            whole[place] = part if isinstance(part, Tensor) else part.block(slice(None))
    return _of_values(whole, rank, dtype)


def _placed(shape: tuple[int, int], place: Place, part: LowRank) -> LowRank:
    if part.shape == shape:
        return part
    left = part.left.new_zeros(shape[0], part.rank, dtype=torch.float64)
    right = part.right.new_zeros(shape[1], part.rank, dtype=torch.float64)
    left[place[0]], right[place[1]] = part.left.double(), part.right.double()
    return LowRank(left, right)


def _of_svd(found: Factors, shape: tuple[int, int], rank: int, dtype: torch.dtype) -> Fitted:
    energy = found.sigma.square()
    total = float(energy.sum())
    exact = balanced(found, rank)
    stored = _cast(exact, rank, dtype)
    # With L and R of orthogonal columns of length √σ, all that the cast kept follows from what it
    # changed, L' = L + E: L'ᵀ·L = diag(σ) + Eᵀ·L. Products of the small E need no float64.
    sigma = found.sigma[:rank].diag()
    inner = own = torch.ones((), dtype=torch.float64)
    for side, cast_side in ((exact.left, stored.left), (exact.right, stored.right)):
        E = (cast_side[:, : side.shape[1]].double() - side.cpu()).float()
        crossed = (E.T @ side.cpu().float()).double()
        inner = inner * (sigma + crossed)
        own = own * (sigma + crossed + crossed.T + (E.T @ E).double())
    kept = _kept(total, float(inner.sum()), float(own.sum()), shape)
    return Fitted(stored, kept, _shares(energy, total, rank), min(found.rank, rank))


def _of_values(update: Tensor, rank: int, dtype: torch.dtype) -> Fitted:
    energy = sum((float(update[rows].double().square().sum()) for rows in _blocks(update)), 0.0)
    if energy == 0:
        return _nothing((update.shape[0], update.shape[1]), rank, dtype)
    V = top_singular(update, rank, energy=energy).V
    found = svd(LowRank(torch.cat([update[rows].double() @ V for rows in _blocks(update)]), V))
    stored = _cast(balanced(found), rank, dtype)
    own = LowRank(stored.left.double(), stored.right.double())
    inner = 0.0
    for rows in _blocks(update):
        inner += float(((update[rows].double() @ own.right) * own.left[rows]).sum())
    shares = _shares(found.sigma.square(), energy, rank)
    kept = _kept(energy, inner, _inner(own, own), update.shape)
    return Fitted(stored, kept, shares, min(found.rank, rank))


def _shares(energies: Tensor, total: float, rank: int) -> dict[int, float]:
    """Return which share of the total the largest 1, 2, 4, … and `rank` energies are."""
    steps = [1 << k for k in range((rank - 1).bit_length())] + [rank]
    if total <= 0:
        return dict.fromkeys(steps, 1.0)
    return {step: min(float(energies[:step].sum()) / total, 1.0) for step in steps}


def _inner(one: LowRank, other: LowRank) -> float:
    """Return ⟨L·Rᵀ, L'·R'ᵀ⟩; sums are exact enough where columns are orthogonal, or nearly so."""
    return float(((one.left.T @ other.left) * (one.right.T @ other.right)).sum())


def _blocks(update: Tensor) -> list[slice]:
    return [slice(start, start + _ROWS) for start in range(0, len(update), _ROWS)]


def _nothing(shape: tuple[int, int], rank: int, dtype: torch.dtype) -> Fitted:
    left, right = (torch.zeros(size, rank, dtype=dtype) for size in shape)
    kept = _kept(0.0, 0.0, 0.0, shape)
    return Fitted(LowRank(left, right), kept, _shares(left, 0.0, rank), 0)


def _cast(factors: LowRank, rank: int, dtype: torch.dtype) -> LowRank:
    """Return the factors as stored, with columns of zeros up to the rank."""
    sides = []
    for side in (factors.left, factors.right):
        stored = torch.zeros(len(side), rank, dtype=dtype)
        stored[:, : side.shape[1]] = side.cpu().to(dtype)
        sides.append(stored)
    return LowRank(*sides)


def _kept(energy: float, inner: float, stored: float, shape: Sequence[int]) -> Kept:
    numel = shape[0] * shape[1]
    return Kept(energy, stored, inner, numel if stored > 0 else 0, numel)
