"""Compiled loops over values on the CPU: each reads memory once, and none holds Python's lock.

Imported where the first is called: numba compiles it then, and keeps it on the disk for the next
process. Arithmetic on weights is in IEEE's order and rounding, as torch's; only sums of products,
which the weights don't depend on to the last bit, may be added in the order that suits the CPU.
A bfloat16 is its 16 bits here.

Numba's traps: a loop that writes where it reads is not done several values at a time (8 ns more an
element), nor is one over arrays unpacked from a two-dimensional one, whose layout it does not know
to be contiguous. Branches in the search for thresholds are guessed wrong (2 to 3 ns an element);
always written, and kept by counting, it takes 0.6.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

Singles = NDArray[np.float32]
Doubles = NDArray[np.float64]
Floats = NDArray[np.floating[Any]]
# bfloat16 values.
Bits = NDArray[np.uint16]
# Of float32 values.
Patterns = NDArray[np.uint32]

# float32 sums are no longer than this; they are added in float64.
CHUNK = 4096
# Compiled loops take some kB each; with less room none is kept.
_ROOM_BYTES = 20_000_000


def _compiled(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    def compiled(function: Callable[..., Any]) -> Any:
        one_off = njit(nogil=True, error_model="numpy", **options)
        try:
            kept = njit(nogil=True, error_model="numpy", cache=True, **options)(function)
            # A disk that is full would end the call that compiles.
            has_room = shutil.disk_usage(kept.stats.cache_path).free >= _ROOM_BYTES
        except (RuntimeError, OSError):  # there is no folder to keep it in
            return one_off(function)
        return kept if has_room else one_off(function)

    return compiled


exact = _compiled()
reordered = _compiled(fastmath={"reassoc", "nsz", "contract"})


@exact
def upcast(bits: Bits, out: Singles) -> None:
    """Write bfloat16 values as float32."""
    raw = out.view(np.uint32)
    for j in range(bits.size):
        raw[j] = np.uint32(bits[j]) << np.uint32(16)


@exact
def narrowed(values: Singles, out: Bits) -> None:
    """Write float32 values as bfloat16, rounded to nearest, ties to even; none is NaN."""
    raw = values.view(np.uint32)
    for j in range(values.size):
        half = np.uint32(0x7FFF) + ((raw[j] >> np.uint32(16)) & np.uint32(1))
        out[j] = np.uint16((raw[j] + half) >> np.uint32(16))


@reordered
def dot(x: Floats, y: Floats) -> Any:
    """Return ⟨x, y⟩, summed in the dtype of y."""
    total = y.dtype.type(0)
    for j in range(x.size):
        total += x[j] * y[j]
    return total


@exact
def dsdot(x: Singles, y: Singles) -> float:
    """Return ⟨x, y⟩ of float32 values: float32 sums of 4,096 products, added in float64."""
    total = 0.0
    for start in range(0, x.size, CHUNK):
        chunk = slice(start, min(start + CHUNK, x.size))
        total += np.float64(dot(x[chunk], y[chunk]))
    return total


@exact
def gram(rows: tuple[Singles, ...], products: Doubles) -> None:
    """Add all ⟨rowsᵢ, rowsⱼ⟩ with j ≤ i, each as `dsdot` adds it.

    Args:
        rows: compiled for each number of them.
        products: (N, N); the lower triangle is added to.
    """
    for start in range(0, rows[0].size, CHUNK):
        chunk = slice(start, min(start + CHUNK, rows[0].size))
        for i in range(len(rows)):
            for j in range(i + 1):
                products[i, j] += np.float64(dot(rows[i][chunk], rows[j][chunk]))


@exact
def subtracted(bits: Bits, base: Singles, out: Singles) -> None:
    """Write bfloat16 values minus float32 ones."""
    for start in range(0, base.size, CHUNK):
        chunk = slice(start, min(start + CHUNK, base.size))
        part, minus = out[chunk], base[chunk]
        upcast(bits[chunk], part)
        for j in range(part.size):
            part[j] = part[j] - minus[j]


@exact
def differences(
    bits: Bits,
    experts: tuple[Bits, ...],
    outs: tuple[Singles, ...],
    products: Doubles,
    all_pairs: bool,
) -> None:
    """Write Δᵢ = Wᵢ − W0 of bfloat16 values, and add ⟨Δᵢ, Δⱼ⟩.

    Args:
        bits: of W0.
        experts: of each Wᵢ; compiled for each number of them.
        outs: of each Δᵢ.
        products: (N, N); the lower triangle is added to.
        all_pairs: or of i = j only.
    """
    room = np.empty(CHUNK, np.float32)
    for start in range(0, bits.size, CHUNK):
        chunk = slice(start, min(start + CHUNK, bits.size))
        base = room[: chunk.stop - start]
        upcast(bits[chunk], base)
        for i in range(len(experts)):
            delta = outs[i][chunk]
            subtracted(experts[i][chunk], base, delta)
            for k in range(0 if all_pairs else i, i + 1):
                products[i, k] += np.float64(dot(delta, outs[k][chunk]))


@exact
def products(bits: Bits, experts: tuple[Bits, ...], sums: Doubles) -> None:
    """Add the products of W0 and all Δᵢ = Wᵢ − W0, of bfloat16 values, with one another.

    Args:
        bits: of W0.
        experts: of each Wᵢ; compiled for each number of them.
        sums: (N + 1, N + 1); the lower triangle is added to, W0 first.
    """
    room = np.empty((len(experts) + 1, CHUNK), np.float32)
    for start in range(0, bits.size, CHUNK):
        chunk = slice(start, min(start + CHUNK, bits.size))
        length = chunk.stop - start
        upcast(bits[chunk], room[0, :length])
        for i in range(len(experts)):
            subtracted(experts[i][chunk], room[0, :length], room[i + 1, :length])
        for i in range(len(experts) + 1):
            for k in range(i + 1):
                sums[i, k] += np.float64(dot(room[i, :length], room[k, :length]))


@exact
def scaled(row: Singles, factor: np.float32, out: Singles) -> None:
    """Write factor·row, float32."""
    for j in range(out.size):
        out[j] = row[j] * factor


@exact
def added(row: Singles, factor: np.float32, total: Singles) -> None:
    """Add factor·row, the product rounded first."""
    for j in range(total.size):
        total[j] = total[j] + row[j] * factor


@exact
def summand(bits: Bits, base: Singles, factor: np.float32, total: Singles, is_first: bool) -> float:
    """Add factor·(values − base), of bfloat16 values, and return ‖values − base‖².

    Args:
        bits: of the values.
        base: float32.
        factor: float32; the product is rounded, then added.
        total: float32, written over by the first summand.
        is_first: whether this is it.
    """
    room, squares = np.empty(CHUNK, np.float32), 0.0
    for start in range(0, base.size, CHUNK):
        chunk = slice(start, min(start + CHUNK, base.size))
        delta = room[: chunk.stop - start]
        subtracted(bits[chunk], base[chunk], delta)
        squares += np.float64(dot(delta, delta))
        if is_first:
            scaled(delta, factor, total[chunk])
        else:
            added(delta, factor, total[chunk])
    return squares


@exact
def moved(base: Singles, update: Singles, out: Bits, sums: Doubles) -> None:
    """Write base + update as bfloat16, and add to the sums what that kept of the update.

    Args:
        base, update: float32.
        out: bfloat16's bits.
        sums: float64: ‖ΔW‖², ⟨ΔW, K⟩, ‖K‖² and the number of nonzero K, with K = out − base.
    """
    room = np.empty(CHUNK, np.float32)
    for start in range(0, base.size, CHUNK):
        chunk = slice(start, min(start + CHUNK, base.size))
        before, change, kept = base[chunk], update[chunk], room[: chunk.stop - start]
        for j in range(kept.size):
            kept[j] = before[j] + change[j]
        narrowed(kept, out[chunk])
        subtracted(out[chunk], before, kept)
        sums[0] += np.float64(dot(change, change))
        sums[1] += np.float64(dot(change, kept))
        sums[2] += np.float64(dot(kept, kept))
        changed = 0
        for j in range(kept.size):
            changed += kept[j] != np.float32(0)
        sums[3] += changed


@exact
def merged_sum(
    bits: Bits,
    experts: tuple[Bits, ...],
    coefficients: Singles,
    own: np.float32,
    out: Bits,
    squares: Doubles,
    sums: Doubles,
) -> None:
    """Write W0 + Σ aᵢ (Wᵢ − W0) + e·W0 of bfloat16 values, all of it while a chunk is in the cache.

    `upcast`, `summand` of each expert and `moved`, chunk by chunk.

    Args:
        bits: of W0.
        experts: of each Wᵢ; compiled for each number of them.
        coefficients: a.
        own: e.
        out: bits of the result.
        squares: ‖Wᵢ − W0‖² are added.
        sums: as `moved` adds them.
    """
    before, update = np.empty(CHUNK, np.float32), np.empty(CHUNK, np.float32)
    for start in range(0, bits.size, CHUNK):
        chunk = slice(start, min(start + CHUNK, bits.size))
        base, total = before[: chunk.stop - start], update[: chunk.stop - start]
        upcast(bits[chunk], base)
        for i in range(len(experts)):
            squares[i] += summand(experts[i][chunk], base, coefficients[i], total, i == 0)
        if own != 0:
            added(base, own, total)
        moved(base, total, out[chunk], sums)


@exact
def shrunk(values: Singles, threshold: np.float32, out: Singles) -> None:
    """Write the float32 values whose magnitude is at least a threshold, zero for the others."""
    for j in range(out.size):
        out[j] = values[j] if abs(values[j]) >= threshold else np.float32(0)


@reordered
def _above(values: Singles, bound: np.float32) -> Any:
    found = np.float32(0)
    for j in range(values.size):
        found += np.float32(1) if abs(values[j]) > bound else np.float32(0)
    return found


@exact
def bracketed(
    values: Singles, low: np.float32, high: np.float32, room: Patterns
) -> tuple[int, int, int]:
    """Sort float32 magnitudes into those above a bracket and those inside.

    Args:
        values: none is NaN.
        low, high: ends of the bracket, both inside.
        room: gets the patterns of those inside, uint32, in order, while 4,096 more fit.

    Returns:
        How many values were looked at, how many of them are above, and how many inside.
    """
    above, inside = 0, 0
    raw = values.view(np.uint32)
    for start in range(0, values.size, CHUNK):
        stop = min(start + CHUNK, values.size)
        if room.size - inside < stop - start:
            return start, above, inside
        above += int(_above(values[start:stop], high))
        for j in range(start, stop):
            # Always written, and kept by counting it: a branch would mostly be guessed wrong.
            size = abs(values[j])
            room[inside] = raw[j] & np.uint32(0x7FFFFFFF)
            inside += (size >= low) & (size <= high)
    return values.size, above, inside


@exact
def elected(
    rows: tuple[Singles, ...],
    weights: Doubles,
    normalize: bool,
    scale: np.float32,
    out: Singles,
) -> None:
    """Write TIES' disjoint merge of float32 rows.

    Args:
        rows: Δᵢ; compiled for each number of them.
        weights: w, float64.
        normalize: divide by the sum of the weights that agree, where it is not zero.
        scale: λ, float32.
        out: float32.
    """
    votes = np.empty(CHUNK)
    share = np.empty(CHUNK, np.float32)
    for start in range(0, out.size, CHUNK):
        chunk = slice(start, min(start + CHUNK, out.size))
        merged, total, weight_of = out[chunk], votes[: chunk.stop - start], share
        merged[:] = 0
        total[:] = 0
        weight_of[:] = 0
        for i in range(len(weights)):
            row, weight = rows[i][chunk], weights[i]
            for j in range(total.size):
                total[j] += row[j] * weight
        for i in range(len(weights)):
            if weights[i] == 0:
                continue
            row, weight = rows[i][chunk], np.float32(weights[i])
            length, side = abs(weight), np.float32(1 if weight > 0 else -1)
            for j in range(total.size):
                sign = side if total[j] >= 0 else -side
                agreeing = row[j] * sign
                if agreeing > 0:
                    merged[j] = merged[j] + agreeing * length
                    weight_of[j] = weight_of[j] + weight
        for j in range(total.size):
            sign = np.float32(1) if total[j] >= 0 else np.float32(-1)
            if normalize and weight_of[j] != 0:
                merged[j] = merged[j] / weight_of[j]
            merged[j] = merged[j] * sign * scale


@exact
def shared_mean(
    rows: tuple[Singles, ...], threshold: np.float32, lone_factors: Singles, out: Singles
) -> None:
    """Write the mean of those of an entry's changes that are larger than a threshold.

    Args:
        rows: Δᵢ; compiled for each number of them.
        threshold: τ ≥ 0.
        lone_factors: of a change that only expert i made.
        out: zero where nobody changed anything.
    """
    counts, lone = np.empty(CHUNK, np.float32), np.empty(CHUNK, np.float32)
    for start in range(0, out.size, CHUNK):
        chunk = slice(start, min(start + CHUNK, out.size))
        total = out[chunk]
        total[:] = 0
        counts[:] = 0
        lone[:] = 0
        for i in range(len(rows)):
            row, factor = rows[i][chunk], lone_factors[i]
            for j in range(total.size):
                changed = abs(row[j]) > threshold
                total[j] = total[j] + (row[j] if changed else np.float32(0))
                counts[j] = counts[j] + (np.float32(1) if changed else np.float32(0))
                lone[j] = lone[j] + (factor if changed else np.float32(0))
        for j in range(total.size):
            if counts[j] == 1:
                total[j] = total[j] * lone[j]
            elif counts[j] > 1:
                total[j] = total[j] / counts[j]


@reordered
def l1_norm(values: Singles) -> Any:
    """Return ‖x‖₁ of float32 values, summed in float64."""
    total = 0.0
    for j in range(values.size):
        total += np.float64(abs(values[j]))
    return total


@exact
def shared_sum(
    rows: tuple[Singles, ...], share: float, least: int, factor: np.float32, out: Singles
) -> None:
    """Write factor·Σ Δᵢ where enough experts matter: |Δᵢ| > share·|Σ Δ − Δᵢ|; elsewhere zero.

    Args:
        rows: Δᵢ; compiled for each number of them.
        share: λ.
        least: as many experts.
        factor: float32.
        out: float32.
    """
    totals, users = np.empty(CHUNK), np.empty(CHUNK, np.float32)
    for start in range(0, out.size, CHUNK):
        chunk = slice(start, min(start + CHUNK, out.size))
        merged = out[chunk]
        total, count = totals[: merged.size], users
        total[:] = 0
        count[:] = 0
        for i in range(len(rows)):
            row = rows[i][chunk]
            for j in range(total.size):
                total[j] += row[j]
        for i in range(len(rows)):
            row = rows[i][chunk]
            for j in range(total.size):
                others = abs(total[j] - row[j]) * share
                count[j] += np.float32(1) if abs(row[j]) > others else np.float32(0)
        for j in range(total.size):
            found = np.float32(total[j]) if count[j] >= least else np.float32(0)
            merged[j] = found * factor
