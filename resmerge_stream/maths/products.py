"""Products of one large float32 matrix, summed in float64 where float32 sums would lose digits."""

import numpy as np
import torch
from torch import Tensor

from .passes import is_plain

# float32 sums longer than this are cut into chunks and added in float64.
CHUNK = 256


# Rows or columns that are converted to float64 at once.
PRECISE_ROWS = 256


def matmul(delta: Tensor, right: Tensor) -> Tensor:
    """Return Δ·X for X of shape (n, c): float32 products, chunks of columns summed in float64."""
    n = delta.shape[1]
    if n <= 4 * CHUNK or delta.is_cuda:
        return delta @ right
    whole = n // (2 * CHUNK) * (2 * CHUNK)
    chunks = delta[:, :whole].reshape(len(delta), -1, 2 * CHUNK).transpose(0, 1)
    total = torch.bmm(chunks, right[:whole].reshape(-1, 2 * CHUNK, right.shape[1])).sum(
        0, dtype=torch.float64
    )
    return (total + delta[:, whole:] @ right[whole:]).float()


def transposed_matmul(delta: Tensor, left: Tensor) -> Tensor:
    """Return Δᵀ·Y for Y of shape (m, c): float32 products, chunks of rows summed in float64."""
    m = delta.shape[0]
    if m <= CHUNK or delta.is_cuda:
        return delta.T @ left
    whole = m // CHUNK * CHUNK
    chunks = delta[:whole].reshape(-1, CHUNK, delta.shape[1])
    rows = left[:whole].reshape(-1, CHUNK, left.shape[1]).transpose(1, 2)
    total = torch.bmm(rows, chunks).sum(0, dtype=torch.float64)
    return (total + left[whole:].T @ delta[whole:]).float().T


def krylov_steps(
    delta: Tensor, scale: float, V: Tensor, T: Tensor, block: Tensor, first: int, stop: int
) -> tuple[Tensor, Tensor]:
    """Take block Lanczos steps on ΔᵀΔ, or on ΔΔᵀ if that is smaller, fully reorthogonalised.

    One vector at a time reads Δ once a step on the CPU, a block of several twice.

    Args:
        delta: Δ, float32, shape (m, n).
        scale: Δ is divided by it; a power of two.
        V: the basis, float32, shape (room, min(m, n)); written, with room for one block more.
        T: the projected matrix, float64, shape (room, room); its lower triangle is written.
        block: the k orthonormal rows to begin with.
        first, stop: the steps to take.

    Returns:
        The next block, and the k × k float64 factor β that the last step left.
    """
    rank = len(block)
    if rank == 1 and is_plain(delta):
        from . import krylov

        V[first] = block[0]
        beta = krylov.steps(delta.numpy(), np.float32(scale), V.numpy(), T.numpy(), first, stop)
        return V[stop : stop + 1].clone(), torch.full((1, 1), beta, dtype=torch.float64)
    m, n = delta.shape
    forward, backward = (transposed_matmul, matmul) if m < n else (matmul, transposed_matmul)
    for done in range(first * rank, stop * rank, rank):
        V[done : done + rank] = block
        basis = V[: done + rank]
        product = (backward(delta, forward(delta, block.T / scale)) / scale).T
        # Orthogonalise twice: the first pass leaves errors of the size of what it removed.
        projection = product @ basis.T
        product = product - projection @ basis
        again = product @ basis.T
        product = product - again @ basis
        T[done : done + rank, : done + rank] = (projection + again).double()
        block, beta = orthonormal_rows(product)
    return block, beta


def precise_gram_product(delta: Tensor, columns: Tensor) -> Tensor:
    """Return ΔᵀΔ·X (or ΔΔᵀ·X on the short side) in float64, a few rows or columns at a time."""
    if columns.shape[1] == 1 and is_plain(delta):
        from . import krylov

        total = np.zeros(len(columns))
        krylov.gram_product(delta.numpy(), columns.flatten().numpy(), total)
        return torch.from_numpy(total)[:, None]
    wide = delta if delta.shape[0] < delta.shape[1] else delta.T
    image = torch.zeros_like(columns)
    for start in range(0, wide.shape[1], PRECISE_ROWS):
        part = wide[:, start : start + PRECISE_ROWS].double()
        image += part @ (part.T @ columns)
    return image


def frobenius_norm(delta: Tensor) -> float:
    """Return ‖Δ‖ from float32 products that neither overflow nor underflow."""
    low, high = torch.aminmax(delta)
    largest = max(-float(low), float(high))
    return largest * float(torch.linalg.vector_norm(delta / largest, dtype=torch.float64))


def orthonormal_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return Q and R with rows = Rᵀ·Q, Q of orthonormal rows; R is float64, upper triangular."""
    if rows.shape[0] == 1:
        norm = torch.linalg.vector_norm(rows, dtype=torch.float64)
        # A matrix with one changed element exhausts its Krylov space exactly: the row is zero.
        return rows / torch.where(norm > _TINY, norm, 1.0).float(), norm.reshape(1, 1)
    Q, R = torch.linalg.qr(rows.T)
    return Q.T.contiguous().to(torch.float32), R.double()


def orthonormal_columns(columns: Tensor) -> Tensor:
    """Return an orthonormal basis of the columns, float64; zero where a column is."""
    columns = columns.to(torch.float64)
    norms = torch.linalg.vector_norm(columns, dim=0)
    Q, R = torch.linalg.qr(columns)
    Q = Q * torch.sign(torch.diagonal(R))
    return torch.where(norms > BREAKDOWN * norms.max(), Q, torch.zeros_like(Q))


BREAKDOWN = 1e-12
# Well above the smallest float32, below every norm of a row that is not rounding noise.
_TINY = 1e-30
