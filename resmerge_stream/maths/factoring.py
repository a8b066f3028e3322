"""An update as the factors of an adapter: the best of a rank, how much of it that is, the cast."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .low_rank import (
    LowRank,
    balanced,
    concatenated,
    core_svd,
    svd,
)
from .rounding import Kept
from .spectral import top_singular

# Rows of a whole update that are multiplied with its factors at once.
_ROWS = 1024
# Squared, the lengths of an update's own terms, added, by the update's.
_MOST_LONGER = 1e4
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
    parts: Sequence[tuple[Place, LowRank | Tensor]],
    rank: int,
    dtype: torch.dtype,
) -> Fitted:
    """Return the best approximation of an update of a rank.

    Args:
        shape: of the update, (m, n).
        parts: the update's parts, where they lie in it: as factors, or as float32 values.
        rank: r ≥ 1.
        dtype: of the factors as they are stored.

    Memory: of factors 16·(m + n)·Σr bytes; of values 4·m·n bytes and what `top_singular` takes.
    """
    if not parts:
        return _nothing(shape, rank, dtype)
    only = parts[0][1]
    factored = [(place, part) for place, part in parts if isinstance(part, LowRank)]
    if len(factored) == len(parts):
        placed = [_placed(shape, *one) for one in factored]
        joined = placed[0] if len(placed) == 1 else concatenated(placed)
        return _of_product(joined, rank, dtype)
    whole = only
    if not isinstance(whole, Tensor) or whole.shape != shape:
        whole = torch.zeros(shape)
        for place, part in parts:
            whole[place] = part if isinstance(part, Tensor) else part.block(slice(None))
    return _of_values(whole, rank, dtype)


def _placed(shape: tuple[int, int], place: Place, part: LowRank) -> LowRank:
    if part.shape == shape:
        return part
    left = part.left.new_zeros(shape[0], part.rank, dtype=torch.float64)
    right = part.right.new_zeros(shape[1], part.rank, dtype=torch.float64)
    left[place[0]], right[place[1]] = part.left.double(), part.right.double()
    return LowRank(left, right)


def _of_product(update: LowRank, rank: int, dtype: torch.dtype) -> Fitted:
    """Return the best factors of a rank; the update's own where they do as well."""
    found = core_svd(update)
    energy = found.sigma.square().cpu()
    total = float(energy.sum())
    # Their own rounding is that of the terms, which may be longer than what they add up to.
    is_short = float(found.lengths.sum()) ** 2 <= _MOST_LONGER * total
    if dtype == torch.float32 and len(found.sigma) == update.rank <= rank and is_short:
        even = (update.right.square().sum(0) / update.left.square().sum(0)) ** 0.25
        turns = even.double(), 1 / even.double()
    else:
        root = found.sigma[:rank].sqrt()
        turns = found.to_left[:, :rank] * root, found.to_right[:, :rank] * root
    sides = [
        _stored(side, turn, rank, dtype)
        for side, turn in zip((update.left, update.right), turns, strict=True)
    ]
    kept = _kept_of(energy, total, sides, shape=update.shape)
    factors = LowRank(*(side for side, _, _ in sides))
    return Fitted(factors, kept, _shares(energy, total, rank), min(len(energy), rank))


def _stored(
    side: Tensor, turn: Tensor, rank: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return a side as it is stored, with columns of zeros up to the rank, and what the cast did.

    Args:
        side: X, a factor of the update.
        turn: T, (r, k): what is stored is X·T; or its diagonal, shape (r,).

    Returns:
        The cast X' = X·T + E; EᵀX·T and EᵀE, float64, or None twice where it is float32: no
        number moves by more than 6e-8 of itself then, which no report shows.
    """
    count = turn.shape[-1]
    stored = torch.zeros(len(side), rank, dtype=dtype)
    crossed, squared = (torch.zeros(count, count, dtype=torch.float64) for _ in range(2))
    for rows in _blocks(side):
        own = side[rows].double()
        exact = (own * turn if turn.dim() == 1 else own @ turn).cpu()
        stored[rows, :count] = exact
        if dtype != torch.float32:
            # Products of the small E need no float64.
            E = (stored[rows, :count].double() - exact).float()
            crossed += E.T @ exact.float()
            squared += E.T @ E
    return (stored, None, None) if dtype == torch.float32 else (stored, crossed, squared)


def _kept_of(
    energy: Tensor,
    total: float,
    sides: Sequence[tuple[Tensor, Tensor | None, Tensor | None]],
    *,
    shape: Sequence[int],
) -> Kept:
    """Return what two sides keep of an update: their columns are orthogonal, of length √σ."""
    rank = sides[0][0].shape[1]
    sigma = energy[:rank].sqrt().diag()
    inner = own = torch.ones((), dtype=torch.float64)
    for _, crossed, squared in sides:
        if crossed is None or squared is None:
            held = float(energy[:rank].sum())
            return _kept(total, held, held, shape)
        # X'ᵀX = diag(σ) + EᵀX
        inner = inner * (sigma + crossed)
        own = own * (sigma + crossed + crossed.T + squared)
    return _kept(total, float(inner.sum()), float(own.sum()), shape)


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
