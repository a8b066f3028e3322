"""Random numbers found by their place alone, in compiled loops: Philox 4x32-10.

Salmon et al. 2011, Parallel random numbers: as easy as 1, 2, 3. A number depends on a key and its
place, so that blocks are drawn in any order, by any thread, in a fifth of the time that torch's
generator takes: 0.5 ns a number, 1.0 with the drop. (numpy's PCG64 and SFC64 take 1.6, and have a
state.) So DARE draws twice rather than noting what it kept.
"""

from __future__ import annotations

import numpy as np

from .kernels import (
    CHUNK,
    Bits,
    Doubles,
    Patterns,
    Singles,
    added,
    dot,
    exact,
    l1_norm,
    moved,
    scaled,
    subtracted,
    upcast,
)

# Places are dealt in chunks of 4 · LANE: word w of counter c·LANE + j is place (4·c + w)·LANE + j.
LANE = CHUNK // 4
# A float32 from [0, 1) has this many bits.
BITS = 24

_ROUNDS = 10
_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85


@exact
def words(key: int, first: int, out: Patterns) -> None:
    """Write the four words of consecutive counters, first words first.

    Args:
        key: from 0, below 2⁶³.
        first: the first counter, likewise.
        out: uint32, four times as long as there are counters.
    """
    count = out.size // 4
    # Slices of their own, so that a loop over counters writes each word to one place after another.
    out0, out1 = out[:count], out[count : 2 * count]
    out2, out3 = out[2 * count : 3 * count], out[3 * count :]
    for j in range(count):
        counter = np.uint64(first) + np.uint64(j)
        c0, c1 = np.uint32(counter), np.uint32(counter >> np.uint64(32))
        c2, c3 = np.uint32(0), np.uint32(0)
        k0, k1 = np.uint32(key), np.uint32(np.uint64(key) >> np.uint64(32))
        for _ in range(_ROUNDS):
            p0, p1 = np.uint64(c0) * np.uint64(_M0), np.uint64(c2) * np.uint64(_M1)
            c0, c2 = (
                np.uint32(p1 >> np.uint64(32)) ^ c1 ^ k0,
                np.uint32(p0 >> np.uint64(32)) ^ c3 ^ k1,
            )
            c1, c3 = np.uint32(p1), np.uint32(p0)
            k0, k1 = np.uint32(k0 + np.uint32(_W0)), np.uint32(k1 + np.uint32(_W1))
        out0[j], out1[j], out2[j], out3[j] = c0, c1, c2, c3


@exact
def fractions(key: int, start: int, out: Singles) -> None:
    """Write the numbers from [0, 1) at consecutive places.

    Args:
        key: as `words` takes it.
        start: the first place.
        out: float32; multiples of 2⁻²⁴.
    """
    room, done = np.empty(CHUNK, np.uint32), 0
    while done < out.size:
        chunk, offset = divmod(start + done, CHUNK)
        words(key, chunk * LANE, room)
        part = out[done : done + CHUNK - offset]
        for j in range(part.size):
            bits = room[offset + j] >> np.uint32(32 - BITS)
            part[j] = np.float32(bits) * np.float32(2.0**-BITS)
        done += part.size


@exact
def dropped(
    values: Singles,
    key: int,
    start: int,
    density: np.float32,
    factor: np.float32,
    out: Singles,
) -> None:
    """Write factor·values where the number at a value's place is below the density, else zero.

    Args:
        values: float32.
        key, start: as `fractions` takes them.
        density: p.
        factor: of what is kept.
        out: float32.
    """
    room = np.empty(CHUNK, np.float32)
    for first in range(0, values.size, CHUNK):
        chunk = slice(first, min(first + CHUNK, values.size))
        part, kept = values[chunk], out[chunk]
        numbers = room[: part.size]
        fractions(key, start + first, numbers)
        for j in range(part.size):
            kept[j] = part[j] * np.float32(numbers[j] < density) * factor


@exact
def dropped_sum(
    bits: Bits,
    experts: tuple[Bits, ...],
    coefficients: Singles,
    keys: np.ndarray,
    start: int,
    densities: Singles,
    factors: Singles,
    out: Bits,
    squares: Doubles,
    sums: Doubles,
) -> None:
    """Write W0 + Σ aᵢ Δ̂ᵢ of bfloat16 values, Δ̂ᵢ what `dropped` leaves of Δᵢ = Wᵢ − W0.

    `kernels.merged_sum` with a drop in between, all of it while a chunk is in the cache.

    Args:
        bits: of W0.
        experts: of each Wᵢ; compiled for each number of them.
        coefficients: a.
        keys: int64, one an expert.
        start: the first place.
        densities, factors: as `dropped` takes them, one an expert.
        out: bits of the result.
        squares: ‖Δᵢ‖² are added.
        sums: as `kernels.moved` adds them.
    """
    before, update = np.empty(CHUNK, np.float32), np.empty(CHUNK, np.float32)
    # Two, since loops that write where they read are not done several values at a time.
    room, left = np.empty(CHUNK, np.float32), np.empty(CHUNK, np.float32)
    for first in range(0, bits.size, CHUNK):
        chunk = slice(first, min(first + CHUNK, bits.size))
        length = chunk.stop - first
        base, total = before[:length], update[:length]
        delta, kept = room[:length], left[:length]
        upcast(bits[chunk], base)
        for i in range(len(experts)):
            subtracted(experts[i][chunk], base, delta)
            squares[i] += np.float64(dot(delta, delta))
            dropped(delta, keys[i], start + first, densities[i], factors[i], kept)
            if i == 0:
                scaled(kept, coefficients[i], total)
            else:
                added(kept, coefficients[i], total)
        moved(base, total, out[chunk], sums)


@exact
def dropped_lengths(
    bits: Bits,
    experts: tuple[Bits, ...],
    keys: np.ndarray,
    start: int,
    densities: Singles,
    factors: Singles,
    lengths: Doubles,
) -> None:
    """Add ‖Δᵢ‖₁ and ‖Δ̂ᵢ‖₁, as `dropped_sum` drops entries.

    Args:
        bits, experts, keys, start, densities, factors: as `dropped_sum` takes them.
        lengths: float64, (N, 2).
    """
    before = np.empty(CHUNK, np.float32)
    room, left = np.empty(CHUNK, np.float32), np.empty(CHUNK, np.float32)
    for first in range(0, bits.size, CHUNK):
        chunk = slice(first, min(first + CHUNK, bits.size))
        length = chunk.stop - first
        base, delta, kept = before[:length], room[:length], left[:length]
        upcast(bits[chunk], base)
        for i in range(len(experts)):
            subtracted(experts[i][chunk], base, delta)
            lengths[i, 0] += l1_norm(delta)
            dropped(delta, keys[i], start + first, densities[i], factors[i], kept)
            lengths[i, 1] += l1_norm(kept)


@exact
def dropped_by_rank(
    values: Singles,
    key: int,
    start: int,
    chances: Singles,
    inverse: bool,
    order: np.ndarray,
    out: Singles,
) -> None:
    """Write values where the number at a value's place is below the chance of its rank, else zero.

    Args:
        values: float32, (b, n).
        key, start: as `fractions` takes them; rows follow one another.
        chances: of the ranks from the smallest magnitude, float32, (n,).
        inverse: whether what is kept is divided by its chance.
        order: int64, (b, n); in each row `ranking` sorted.
        out: float32, (b, n).
    """
    b, n = values.shape
    numbers = np.empty(n, np.float32)
    for i in range(b):
        fractions(key, start + i * n, numbers)
        for rank in range(n):
            j = order[i, rank] & np.int64(0xFFFFFFFF)
            chance = chances[rank]
            kept = values[i, j] * np.float32(numbers[j] < chance)
            out[i, j] = kept / chance if inverse else kept


@exact
def ranking(values: Singles, keys: np.ndarray) -> None:
    """Write numbers that are ordered as the magnitudes in each row, equal ones by their places.

    Args:
        values: float32, (b, n), none NaN.
        keys: int64, (b, n): a magnitude's bits above its place.
    """
    raw = values.view(np.uint32)
    b, n = values.shape
    for i in range(b):
        for j in range(n):
            size = np.int64(raw[i, j] & np.uint32(0x7FFFFFFF))
            keys[i, j] = (size << np.int64(32)) | np.int64(j)
