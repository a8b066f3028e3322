"""Compiled loops over values on the CPU: each reads memory once, and none holds Python's lock.

Imported where the first is called: numba compiles it then, and keeps it on the disk for the next
process. Arithmetic on weights is in IEEE's order and rounding, as torch's; only sums of products,
which the weights don't depend on to the last bit, may be added in the order that suits the CPU.
A bfloat16 is its 16 bits here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

Singles = NDArray[np.float32]
Doubles = NDArray[np.float64]
# bfloat16 values.
Bits = NDArray[np.uint16]
# Of float32 values.
Patterns = NDArray[np.uint32]

# float32 sums are no longer than this; they are added in float64.
CHUNK = 4096
# Well above the smallest float32, below every norm of a row that is not rounding noise.
TINY = 1e-30


def _compiled(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    def compiled(function: Callable[..., Any]) -> Any:
        try:
            return njit(nogil=True, error_model="numpy", cache=True, **options)(function)
        except RuntimeError:  # no folder to keep it in
            return njit(nogil=True, error_model="numpy", **options)(function)

    return compiled


exact = _compiled()
reordered = _compiled(fastmath={"reassoc", "nsz", "contract"})


@exact
def widened(bits: Bits, out: Singles) -> None:
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
def _inner(x: Singles, y: Singles) -> Any:
    total = np.float32(0)
    for j in range(x.size):
        total += x[j] * y[j]
    return total


@exact
def inner(x: Singles, y: Singles) -> float:
    """Return ⟨x, y⟩ of float32 values: float32 sums of 4,096 products, added in float64."""
    total = 0.0
    for start in range(0, x.size, CHUNK):
        chunk = slice(start, min(start + CHUNK, x.size))
        total += np.float64(_inner(x[chunk], y[chunk]))
    return total


@exact
def gram(rows: tuple[Singles, ...], products: Doubles) -> None:
    """Add all ⟨rowsᵢ, rowsⱼ⟩ with j ≤ i, each as `inner` adds it.

    Args:
        rows: compiled for each number of them.
        products: (N, N); the lower triangle is added to.
    """
    for start in range(0, rows[0].size, CHUNK):
        chunk = slice(start, min(start + CHUNK, rows[0].size))
        for i in range(len(rows)):
            for j in range(i + 1):
                products[i, j] += np.float64(_inner(rows[i][chunk], rows[j][chunk]))


@exact
def subtracted(bits: Bits, base: Singles, out: Singles) -> None:
    """Write bfloat16 values minus float32 ones."""
    for start in range(0, base.size, CHUNK):
        chunk = slice(start, min(start + CHUNK, base.size))
        part, minus = out[chunk], base[chunk]
        widened(bits[chunk], part)
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
        widened(bits[chunk], base)
        for i in range(len(experts)):
            delta = outs[i][chunk]
            widened(experts[i][chunk], delta)
            for j in range(delta.size):
                delta[j] = delta[j] - base[j]
            for k in range(0 if all_pairs else i, i + 1):
                products[i, k] += np.float64(_inner(delta, outs[k][chunk]))


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
        minus, part, delta = base[chunk], total[chunk], room[: chunk.stop - start]
        widened(bits[chunk], delta)
        for j in range(delta.size):
            delta[j] = delta[j] - minus[j]
        squares += np.float64(_inner(delta, delta))
        if is_first:
            for j in range(delta.size):
                part[j] = delta[j] * factor
        else:
            for j in range(delta.size):
                part[j] = part[j] + delta[j] * factor
    return squares


@exact
def _tally(update: Singles, kept: Singles, sums: Doubles) -> None:
    sums[0] += np.float64(_inner(update, update))
    sums[1] += np.float64(_inner(update, kept))
    sums[2] += np.float64(_inner(kept, kept))
    changed = 0
    for j in range(kept.size):
        changed += kept[j] != np.float32(0)
    sums[3] += changed


@exact
def moved_and_narrowed(base: Singles, update: Singles, out: Bits, sums: Doubles) -> None:
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
        widened(out[chunk], kept)
        for j in range(kept.size):
            kept[j] = kept[j] - before[j]
        _tally(change, kept, sums)


@exact
def moved(base: Singles, update: Singles, out: Singles, sums: Doubles) -> None:
    """Write base + update as float32, and add to the sums as `moved_and_narrowed` does."""
    room = np.empty(CHUNK, np.float32)
    for start in range(0, base.size, CHUNK):
        chunk = slice(start, min(start + CHUNK, base.size))
        before, change, kept = base[chunk], update[chunk], room[: chunk.stop - start]
        after = out[chunk]
        for j in range(kept.size):
            after[j] = before[j] + change[j]
            kept[j] = after[j] - before[j]
        _tally(change, kept, sums)


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

    The same values as `widened`, `summand` of each and `moved_and_narrowed`, one after the other.

    Args:
        bits: of W0.
        experts: of each Wᵢ; compiled for each number of them.
        coefficients: a.
        own: e.
        out: bits of the result.
        squares: ‖Wᵢ − W0‖² are added.
        sums: as `moved_and_narrowed` adds them.
    """
    before, delta = np.empty(CHUNK, np.float32), np.empty(CHUNK, np.float32)
    total, kept = np.empty(CHUNK, np.float32), np.empty(CHUNK, np.float32)
    for start in range(0, bits.size, CHUNK):
        chunk = slice(start, min(start + CHUNK, bits.size))
        size = chunk.stop - start
        base, change, sum_, rest = before[:size], delta[:size], total[:size], kept[:size]
        widened(bits[chunk], base)
        for i in range(len(experts)):
            widened(experts[i][chunk], change)
            factor = coefficients[i]
            for j in range(size):
                change[j] = change[j] - base[j]
            squares[i] += np.float64(_inner(change, change))
            if i == 0:
                for j in range(size):
                    sum_[j] = change[j] * factor
            else:
                for j in range(size):
                    sum_[j] = sum_[j] + change[j] * factor
        if own != 0:
            for j in range(size):
                sum_[j] = sum_[j] + base[j] * own
        for j in range(size):
            rest[j] = base[j] + sum_[j]
        narrowed(rest, out[chunk])
        widened(out[chunk], rest)
        for j in range(size):
            rest[j] = rest[j] - base[j]
        _tally(sum_, rest, sums)


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
    rows: Singles, weights: Doubles, normalize: bool, scale: np.float32, out: Singles
) -> None:
    """Write TIES' disjoint merge of float32 rows.

    Args:
        rows: Δ, (N, size).
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
            row, weight = rows[i, chunk], weights[i]
            for j in range(total.size):
                total[j] += row[j] * weight
        for i in range(len(weights)):
            if weights[i] == 0:
                continue
            row, weight = rows[i, chunk], np.float32(weights[i])
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
def _axpy(row: Singles, factor: np.float32, total: Singles) -> None:
    for j in range(row.size):
        total[j] += factor * row[j]


@exact
def tall_product(matrix: Singles, x: Singles, image: Doubles, rows_at_once: int) -> None:
    """Add ΔᵀΔ·x to the image: both products of a row while it is in the cache.

    Args:
        matrix: Δ, float32, (m, n).
        x: float32, (n,).
        image: float64, (n,).
        rows_at_once: rows that are added up in float32.
    """
    m, n = matrix.shape
    part = np.empty(n, np.float32)
    for start in range(0, m, rows_at_once):
        part[:] = 0
        for i in range(start, min(start + rows_at_once, m)):
            _axpy(matrix[i], np.float32(inner(matrix[i], x)), part)
        for j in range(n):
            image[j] += np.float64(part[j])


@exact
def wide_product(matrix: Singles, x: Singles, image: Doubles, columns_at_once: int) -> None:
    """Add ΔΔᵀ·x to the image: both products of some columns while they are in the cache.

    Args:
        matrix: Δ, float32, (m, n).
        x: float32, (m,).
        image: float64, (m,).
        columns_at_once: how many; their part of an element is added up in float32.
    """
    m, n = matrix.shape
    room = np.empty(columns_at_once, np.float32)
    for start in range(0, n, columns_at_once):
        stop = min(start + columns_at_once, n)
        part = room[: stop - start]
        part[:] = 0
        for i in range(m):
            _axpy(matrix[i, start:stop], x[i], part)
        for i in range(m):
            image[i] += np.float64(_inner(matrix[i, start:stop], part))


@exact
def krylov(
    matrix: Singles,
    scale: np.float32,
    V: Singles,
    T: Doubles,
    first: int,
    stop: int,
    at_once: int,
) -> float:
    """Take Lanczos steps on ΔᵀΔ, or on ΔΔᵀ if that is smaller, with full reorthogonalisation.

    Args:
        matrix: Δ, float32, (m, n).
        scale: Δ is divided by it; a power of two, float32.
        V: the basis, float32, (steps, min(m, n)); row `first` is the unit vector to begin with.
        T: the projected matrix, float64, (steps, steps); its lower triangle is written.
        first, stop: the steps to take; V has a row `stop` for the next unit vector.
        at_once: rows (or columns, if these are more) that are added up in float32.

    Returns:
        The length β of what the last step added.
    """
    short = V.shape[1]
    is_wide = matrix.shape[0] < matrix.shape[1]
    image, x = np.empty(short), np.empty(short, np.float32)
    product, inner_products = np.empty(short, np.float32), np.empty(stop)
    beta = 0.0
    for step in range(first, stop):
        for j in range(short):
            x[j] = V[step, j] / scale
        image[:] = 0
        if is_wide:
            wide_product(matrix, x, image, at_once)
        else:
            tall_product(matrix, x, image, at_once)
        for j in range(short):
            product[j] = image[j] / scale
        T[step, : step + 1] = 0
        # Twice: the first pass leaves errors of the size of what it removed.
        for _ in range(2):
            for i in range(step + 1):
                inner_products[i] = inner(V[i], product)
            for i in range(step + 1):
                _axpy(V[i], np.float32(-inner_products[i]), product)
                T[step, i] += inner_products[i]
        beta = math.sqrt(inner(product, product))
        # A matrix with one changed element exhausts its Krylov space exactly: the row is zero.
        divisor = np.float32(beta if beta > TINY else 1.0)
        for j in range(short):
            V[step + 1, j] = product[j] / divisor
    return beta


@reordered
def _precise_inner(row: Singles, x: Doubles) -> float:
    total = 0.0
    for j in range(row.size):
        total += np.float64(row[j]) * x[j]
    return total


@reordered
def _precise_axpy(row: Singles, factor: float, total: Doubles) -> None:
    for j in range(row.size):
        total[j] += factor * np.float64(row[j])


@exact
def precise_tall_product(matrix: Singles, x: Doubles, image: Doubles) -> None:
    """Add ΔᵀΔ·x to the image as `tall_product`, all sums in float64.

    Args:
        matrix: Δ, float32, (m, n).
        x, image: float64, (n,).
    """
    for i in range(len(matrix)):
        _precise_axpy(matrix[i], _precise_inner(matrix[i], x), image)


@exact
def precise_wide_product(matrix: Singles, x: Doubles, image: Doubles, columns_at_once: int) -> None:
    """Add ΔΔᵀ·x to the image as `wide_product`, all sums in float64.

    Args:
        matrix: Δ, float32, (m, n).
        x, image: float64, (m,).
        columns_at_once: how many.
    """
    m, n = matrix.shape
    room = np.empty(columns_at_once)
    for start in range(0, n, columns_at_once):
        stop = min(start + columns_at_once, n)
        part = room[: stop - start]
        part[:] = 0
        for i in range(m):
            _precise_axpy(matrix[i, start:stop], x[i], part)
        for i in range(m):
            image[i] += _precise_inner(matrix[i, start:stop], part)
