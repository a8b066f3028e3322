"""Task vectors of one matrix: Δ_i = W_i − W0 in float32, by row blocks, from the stored bytes.

Blocks depend on the shape only, so the memory at hand never changes a bit of a result. Whole
float32 copies (`matrix`) are kept for all experts when the budget allows (`resident`), or made
again for one expert at a time; either way the values are the same.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .memory import BLOCK_ELEMENTS
from .specs import DTYPES

_DOT_CHUNK = 4096


class NonFiniteValues(Exception):
    """Some task vector is not finite; `source` is −1 for the base, else the expert's index."""

    def __init__(self, source: int) -> None:
        super().__init__(source)
        self.source = source


@dataclass(slots=True)
class Workspace:
    """Float32 scratch memory, reused from tensor to tensor so that it never fragments.

    Attributes:
        device: where the arithmetic happens.
    """

    device: torch.device
    _buffers: dict[str, Tensor] = field(default_factory=dict)

    def take(self, name: str, numel: int) -> Tensor:
        """Return a one-dimensional float32 buffer of `numel` elements; contents undefined."""
        buffer = self._buffers.get(name)
        if buffer is None or buffer.numel() < numel:
            self._buffers.pop(name, None)  # free before allocating: both never live at once
            buffer = torch.empty(numel, dtype=torch.float32, device=self.device)
            self._buffers[name] = buffer
        return buffer[:numel]


def block_rows(m: int, n: int) -> int:
    """Return how many rows of an m × n matrix one block has; a multiple of 16 or all of them."""
    rows = max(BLOCK_ELEMENTS // max(n, 1) // 16 * 16, 16)
    return min(rows, max(m, 1))


def as_tensor(buffer: memoryview, dtype: str, shape: tuple[int, ...]) -> Tensor:
    """Return stored bytes as a CPU tensor of their dtype, sharing the memory."""
    if len(buffer) == 0:
        return torch.empty(shape, dtype=getattr(torch, DTYPES[dtype].torch_name))
    return torch.frombuffer(buffer, dtype=getattr(torch, DTYPES[dtype].torch_name)).view(shape)


class TaskVectors:
    """The task vectors of N experts for one matrix of shape (m, n).

    Args:
        base: W0 as stored, shape (m, n), CPU.
        experts: W_i as stored, same shape, any float dtype, CPU.
        workspace: scratch memory and the device.
        resident: keep float32 copies of all Δ_i (4·N·m·n bytes) rather than of one at a time.
    """

    def __init__(
        self, base: Tensor, experts: Sequence[Tensor], workspace: Workspace, *, resident: bool
    ) -> None:
        self.shape: tuple[int, int] = (base.shape[0], base.shape[1])
        self.count = len(experts)
        self._base, self._experts, self._workspace = base, experts, workspace
        self._whole: Tensor | None = None
        self._gram = torch.zeros(self.count, self.count, dtype=torch.float64)
        self._summed: dict[int, bool] = {}  # start row of a block → whether it is all zero
        m, n = self.shape
        if resident:
            whole = workspace.take("delta", self.count * m * n).view(self.count, m, n)
            for rows in self.blocks():
                self._subtract(rows, whole[:, rows])
                self._sum(rows, whole[:, rows])
            self._whole = whole

    def blocks(self) -> list[slice]:
        """Return the row blocks, in order."""
        m, n = self.shape
        step = block_rows(m, n)
        return [slice(start, min(start + step, m)) for start in range(0, m, step)]

    def base(self, rows: slice) -> Tensor:
        """Return W0 of some rows, float32, shape (b, n), on the device."""
        return self._base[rows].to(self._workspace.device, torch.float32)

    def stack(self, rows: slice) -> Tensor:
        """Return all Δ_i of some rows, float32, shape (N, b, n).

        The memory may be reused by the next call. Not to be modified.

        Raises:
            NonFiniteValues: some of these values are NaN or infinite, or overflow float32.
        """
        if self._whole is not None:
            return self._whole[:, rows]
        b, n = rows.stop - rows.start, self.shape[1]
        stack = self._workspace.take("block", self.count * b * n).view(self.count, b, n)
        self._subtract(rows, stack)
        self._sum(rows, stack)
        return stack

    def matrix(self, i: int) -> Tensor:
        """Return Δ_i whole, float32, shape (m, n); the memory may be reused by the next call."""
        if self._whole is not None:
            return self._whole[i]
        m, n = self.shape
        matrix = self._workspace.take("delta", m * n).view(m, n)
        for rows in self.blocks():
            matrix[rows].copy_(self._experts[i][rows])
            matrix[rows].sub_(self.base(rows))
        return matrix

    def gram(self) -> Tensor:
        """Return D, D_ij = ⟨Δ_i, Δ_j⟩, float64, shape (N, N), on the CPU.

        Raises:
            NonFiniteValues: as `stack`.
        """
        for rows in self.blocks():
            if rows.start not in self._summed:
                self.stack(rows)
        return self._gram

    def is_zero(self, rows: slice | None = None) -> bool:
        """Return whether every Δ_i is zero in a block that was read, or in the whole matrix."""
        if rows is not None:
            return self._summed[rows.start]
        self.gram()
        return all(self._summed.values())

    def project(self, V: Tensor) -> Tensor:
        """Return Δ_j·V for all j: V of shape (n, c), result float32 of shape (N, m, c)."""
        result = torch.empty(self.count, self.shape[0], V.shape[1], device=V.device)
        for rows in self.blocks():
            result[:, rows] = torch.matmul(self.stack(rows), V)
        return result

    def _subtract(self, rows: slice, out: Tensor) -> None:
        base = self.base(rows)
        for i, expert in enumerate(self._experts):
            out[i].copy_(expert[rows])
            out[i].sub_(base)

    def _sum(self, rows: slice, stack: Tensor) -> None:
        if rows.start in self._summed:
            return
        gram = block_gram(stack)
        if not torch.isfinite(gram).all():
            raise NonFiniteValues(self._culprit(rows))
        self._gram += gram
        self._summed[rows.start] = not bool(gram.diagonal().any())

    def _culprit(self, rows: slice) -> int:
        if not torch.isfinite(self._base[rows].float()).all():
            return -1
        for i, expert in enumerate(self._experts):
            if not torch.isfinite(expert[rows].float()).all():
                return i
        return 0  # finite, but the difference overflows


def block_gram(stack: Tensor) -> Tensor:
    """Return ⟨X_i, X_j⟩ of a stack of shape (N, b, n): float64, shape (N, N), on the CPU.

    Products are float32 over chunks of 4,096 elements, summed in float64: `torch.dot` over a
    whole FFN matrix is off by up to 1 % on a CPU (docs/log.md).
    """
    flat = stack.flatten(1)
    whole = flat.shape[1] // _DOT_CHUNK * _DOT_CHUNK
    chunks = flat[:, :whole].view(len(flat), -1, _DOT_CHUNK).transpose(0, 1)
    total = torch.bmm(chunks, chunks.transpose(1, 2)).sum(0, dtype=torch.float64)
    rest = flat[:, whole:]
    if rest.shape[1]:
        total = total + (rest @ rest.T).double()
    return total.cpu()
