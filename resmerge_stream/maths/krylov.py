"""Compiled Lanczos steps on the CPU, of one vector: each reads the matrix once.

Both products of ΔᵀΔ·x are made of a row, or of a few columns, while it is in the cache. Sums are in
the dtype of x: float32 in short parts that are added in float64, or float64 throughout.
"""

from __future__ import annotations

import math

import numpy as np

from .kernels import Doubles, Floats, Singles, dot, dsdot, exact, reordered

# Rows, or columns of a wide matrix, whose parts of a product are added up before float64's turn.
ROWS, COLUMNS = 256, 128
# Well above the smallest float32, below every norm of a row that is not rounding noise.
_TINY = 1e-30


@reordered
def _axpy(row: Singles, factor: float, total: Floats) -> None:
    for j in range(row.size):
        total[j] += factor * row[j]


@exact
def gram_product(matrix: Singles, x: Floats, image: Doubles) -> None:
    """Add ΔᵀΔ·x, or ΔΔᵀ·x if that is smaller, to the image.

    Args:
        matrix: Δ, float32, (m, n).
        x: float32 or float64, (min(m, n),).
        image: float64, likewise.
    """
    m, n = matrix.shape
    if m < n:
        room = np.empty(COLUMNS, x.dtype)
        for start in range(0, n, COLUMNS):
            stop = min(start + COLUMNS, n)
            part = room[: stop - start]
            part[:] = 0
            for i in range(m):
                _axpy(matrix[i, start:stop], x[i], part)
            for i in range(m):
                image[i] += np.float64(dot(matrix[i, start:stop], part))
        return
    part = np.empty(n, x.dtype)
    for start in range(0, m, ROWS):
        part[:] = 0
        for i in range(start, min(start + ROWS, m)):
            _axpy(matrix[i], x.dtype.type(dsdot(matrix[i], x)), part)
        for j in range(n):
            image[j] += np.float64(part[j])


@exact
def steps(
    matrix: Singles, scale: np.float32, V: Singles, T: Doubles, first: int, stop: int
) -> float:
    """Take Lanczos steps on ΔᵀΔ, or on ΔΔᵀ if that is smaller, with full reorthogonalisation.

    Args:
        matrix: Δ, float32, (m, n).
        scale: Δ is divided by it; a power of two, float32.
        V: the basis, float32, (steps, min(m, n)); row `first` is the unit vector to begin with.
        T: the projected matrix, float64, (steps, steps); its lower triangle is written.
        first, stop: the steps to take; V has a row `stop` for the next unit vector.

    Returns:
        The length β of what the last step added.
    """
    short = V.shape[1]
    image, x = np.empty(short), np.empty(short, np.float32)
    product, projections = np.empty(short, np.float32), np.empty(stop)
    beta = 0.0
    for step in range(first, stop):
        for j in range(short):
            x[j] = V[step, j] / scale
        image[:] = 0
        gram_product(matrix, x, image)
        for j in range(short):
            product[j] = image[j] / scale
        T[step, : step + 1] = 0
        # Twice: the first pass leaves errors of the size of what it removed.
        for _ in range(2):
            for i in range(step + 1):
                projections[i] = dsdot(V[i], product)
            for i in range(step + 1):
                _axpy(V[i], np.float32(-projections[i]), product)
                T[step, i] += projections[i]
        beta = math.sqrt(dsdot(product, product))
        # A matrix with one changed element exhausts its Krylov space exactly: the row is zero.
        divisor = np.float32(beta if beta > _TINY else 1.0)
        for j in range(short):
            V[step + 1, j] = product[j] / divisor
    return beta
