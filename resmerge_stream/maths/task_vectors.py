"""Task vectors of one matrix: Δ_i = W_i − W0 in float32, by row blocks, from what is stored.

Blocks depend on the shape only, so the memory at hand never changes a bit of a result. Whole
float32 copies (`matrix`) are kept for all experts when the budget allows (`resident`), or made
again for one expert at a time; either way the values are the same.

An expert may be stored values or an adapter's factors (`changes`). Where all are of low rank,
`space` answers what can be answered from the factors alone, and no Δ_i needs to be formed.
"""

import itertools
import math
import threading
from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..memory import BLOCK_ELEMENTS, DEVICE_BLOCKS, PART_ROWS, PARTS
from .changes import Change, Dense, Factored, Unchanged, are_same
from .cores import Cores
from .low_rank import Factors, FactorSpace, LowRank
from .passes import (
    Drop,
    combined,
    differences,
    dropped_lengths,
    dsdot,
    gram,
    l1_norm,
    merged_sum,
    products,
    summed,
    upcast,
)
from .products import CHUNK

T = TypeVar("T")
_MANY_COLUMNS = 16


class NonFiniteValues(Exception):
    """Some task vector is not finite; `source` is −1 for the base, else the expert's index."""

    def __init__(self, source: int) -> None:
        super().__init__(source)
        self.source = source


class Workspace:
    """Float32 buffers that are lent, taken back and lent again: allocating them anew for every
    tensor costs more in page faults than the arithmetic saves.

    Args:
        device: where the arithmetic happens.
        limit: bytes of buffers, lent or kept for later; what is kept is dropped beyond it.
        cores: that may help with a matrix; none but the caller's own when None.
    """

    def __init__(
        self, device: torch.device, limit: int = 1 << 62, cores: Cores | None = None
    ) -> None:
        self.device = device
        self.cores = cores or Cores(0)
        self._limit = limit
        self._total = self._beside = 0
        self._free: dict[int, list[Tensor]] = {}
        self._lock = threading.Lock()
        # Held by whoever needs much memory for a moment.
        self.alone = threading.Lock()

    def take(self, numel: int) -> Tensor:
        """Lend a one-dimensional float32 buffer of `numel` elements; contents undefined."""
        with self._lock:
            if self._free.get(numel):
                return self._free[numel].pop()
            self._drop_beyond(self._limit - self._beside - 4 * numel)
            self._total += 4 * numel
        return torch.empty(numel, dtype=torch.float32, device=self.device)

    def give(self, buffer: Tensor) -> None:
        """Take a lent buffer back."""
        with self._lock:
            self._free.setdefault(buffer.numel(), []).append(buffer)

    @property
    def lent_bytes(self) -> int:
        """Bytes of buffers that were not given back."""
        with self._lock:
            kept = sum(size * len(found) for size, found in self._free.items())
            return self._total - 4 * kept

    def drop(self) -> None:
        """Forget the buffers that are not lent."""
        with self._lock:
            self._drop_beyond(0)

    def leave_room(self, beside: int) -> None:
        """Keep no more than the limit allows beside so many bytes that others hold, from now on."""
        with self._lock:
            self._beside = beside
            self._drop_beyond(self._limit - beside)

    def _drop_beyond(self, nbytes: int) -> None:
        for size in sorted(self._free, reverse=True):
            while self._free[size] and self._total > nbytes:
                del self._free[size][-1]
                self._total -= 4 * size


def block_rows(m: int, n: int, device: str = "cpu") -> int:
    """Return how many rows of an m × n matrix one block has: a multiple of 4 where rows are short.

    Args:
        device: the type of the device. A GPU's block is some of the CPU's.
    """
    rows = max(BLOCK_ELEMENTS // max(n, 1), 1)
    rows -= rows % 4 if rows > 4 else 0
    return min(rows if device == "cpu" else DEVICE_BLOCKS * rows, max(m, 1))


class TaskVectors:
    """The task vectors of N experts for one matrix of shape (m, n).

    Args:
        base: W0 as stored, shape (m, n), on the CPU or on the workspace's device.
        experts: each W_i as stored, same shape, any float dtype, likewise; or how the expert
            changes W0.
        workspace: scratch memory and the device.
        resident: keep float32 copies of all Δ_i (4·N·m·n bytes) rather than of one at a time;
            never done where all are of low rank.
        release: told which rows of the stored bytes are not needed for a while.

    Attributes:
        low_rank: all Δ_i as L·Rᵀ, or None where some are not given so.

    Raises:
        NonFiniteValues: some task vector that is kept or given by factors is not finite.
    """

    def __init__(
        self,
        base: Tensor,
        experts: Sequence[Tensor | Change],
        workspace: Workspace,
        *,
        resident: bool,
        release: Callable[[slice], None] = lambda rows: None,
    ) -> None:
        self.shape: tuple[int, int] = (base.shape[0], base.shape[1])
        self.count = len(experts)
        self._base, self._workspace = base, workspace
        self._changes = [Dense(e) if isinstance(e, Tensor) else e for e in experts]
        self._release = release
        self._lent: dict[str, Tensor] = {}
        self._whole: Tensor | None = None
        self._made: dict[Hashable, Any] = {}
        # Of each block that was read; taken at once, so that no heap is broken into pieces.
        self._step = block_rows(*self.shape, workspace.device.type)
        blocks = -(-self.shape[0] // self._step)
        self._grams = torch.zeros(blocks, self.count, self.count, dtype=torch.float64)
        self._summed = [False] * blocks
        self._zero: list[bool | None] = [None] * blocks  # None: not looked at yet
        self.low_rank = self._low_rank()
        if resident and self.low_rank is None:
            try:
                m, n = self.shape
                whole = self._buffer("whole", self.count * m * n).view(self.count, m, n)
                self.cores.each_run(self.blocks(), lambda rows: self._sum(rows, whole[:, rows]))
                self._whole = whole
            except BaseException:
                self.close()
                raise

    @property
    def alone(self) -> threading.Lock:
        """A lock for work that needs much memory for a moment: one thread at a time."""
        return self._workspace.alone

    @property
    def has_large_blocks(self) -> bool:
        """Whether a row block is larger than most: a row alone is longer than one.

        Temporaries of one at a time are all that the plan counts.
        """
        return self.device.type == "cpu" and self._step * self.shape[1] > BLOCK_ELEMENTS

    @property
    def cores(self) -> Cores:
        """What helps with this matrix while it is idle; nothing where row blocks are large."""
        return Cores(0) if self.has_large_blocks else self._workspace.cores

    @property
    def are_whole(self) -> bool:
        """Whether every Δ_i lies in memory, so that `matrix` may be called by several threads."""
        return self._whole is not None

    def close(self) -> None:
        """Give the float32 copies back; the task vectors are not to be used any more."""
        for buffer in self._lent.values():
            self._workspace.give(buffer)
        self._lent.clear()
        self._made.clear()
        self._whole = None

    @property
    def space(self) -> FactorSpace | None:
        """The task vectors' own coordinates, or None where not all are of low rank."""
        factors = self.low_rank
        return None if factors is None else self.once("space", lambda: FactorSpace(factors))

    @property
    def are_unchanged(self) -> bool:
        """Whether no expert touches this matrix at all."""
        return all(isinstance(change, Unchanged) for change in self._changes)

    @property
    def device(self) -> torch.device:
        """Where the arithmetic happens."""
        return self._workspace.device

    def once(self, key: Hashable, make: Callable[[], T]) -> T:
        """Return what `make` returns, made once: several methods share a decomposition."""
        if key not in self._made:
            self._made[key] = make()
        found: T = self._made[key]
        return found

    def factored_svd(self, i: int, keep: int | None = None) -> Factors | None:
        """Return the SVD of Δ_i if the expert gives it by factors, else None.

        Args:
            i: the expert's index.
            keep: how many of the leading triplets; None for all.
        """
        if self.space is not None:
            return self.space.svd(i, keep)
        factors = _factors_of(self._changes[i], self.shape, self.device)
        if factors is None:
            return None
        return self.once(("factors of", i), lambda: FactorSpace([factors])).svd(0, keep)

    def blocks(self) -> list[slice]:
        """Return the row blocks, in order."""
        m, step = self.shape[0], self._step
        return [slice(start, min(start + step, m)) for start in range(0, m, step)]

    def base(self, rows: slice) -> Tensor:
        """Return W0 of some rows, float32, shape (b, n), on the device."""
        return upcast(self._stored(self._base, rows))

    def expert(self, i: int, rows: slice) -> Tensor:
        """Return W_i of some rows, float32, shape (b, n), on the device."""
        change = self._changes[i]
        if isinstance(change, Dense):
            return upcast(self._stored(change.values, rows))
        delta = torch.empty(rows.stop - rows.start, self.shape[1], device=self.device)
        base = self.base(rows)
        change.subtract(base, rows, delta)
        return delta.add_(base)

    def stack(self, rows: slice) -> Tensor:
        """Return all Δ_i of some rows, float32, shape (N, b, n).

        The memory may be reused by the thread's next call. Not to be modified.

        Raises:
            NonFiniteValues: some of these values are NaN or infinite, or overflow float32.
        """
        stack, _ = self._read(rows)
        if self._whole is None:
            self._release(rows)
        return stack

    def block(self, rows: slice) -> tuple[Tensor, Tensor]:
        """Return all Δ_i and W0 of some rows, as `stack` and `base` do, reading W0 once.

        Raises:
            NonFiniteValues: as `stack`.
        """
        stack, base = self._read(rows)
        return stack, self.base(rows) if base is None else base

    def summed(self, rows: slice, coefficients: Sequence[float]) -> tuple[Tensor, Tensor]:
        """Return Σ aᵢ Δᵢ and W0 of some rows, both float32, shape (b, n); nothing is released.

        Raises:
            NonFiniteValues: as `stack`.
        """
        if stored := self._all_stored(rows):
            base = self.base(rows)
            if (found := summed(stored, base, coefficients)) is not None:
                self._note(rows, found[1])
                return found[0], base
        stack, base = self.block(rows)
        return combined(stack, coefficients), base

    def write_sum(
        self,
        rows: slice,
        coefficients: Sequence[float],
        own: float,
        out: Tensor,
        drop: Drop | None = None,
    ) -> list[float] | None:
        """Write W0 + Σ aᵢ Δᵢ + e·W0 of some rows; return what rounding kept. Releases nothing.

        Args:
            rows: a block.
            coefficients: a.
            own: e; 0 where entries are dropped.
            out: the weights, shape (b, n).
            drop: which entries of the Δᵢ count; all when None.

        Returns:
            As `passes.moved`; None where it cannot be done in one pass, or all Δᵢ are zero.

        Raises:
            NonFiniteValues: as `stack`.
        """
        stored = self._all_stored(rows)
        if not stored:
            return None
        chosen = None if drop is None else (drop, rows.start * self.shape[1])
        found = merged_sum(self._base[rows], stored, coefficients, own, out, chosen)
        if found is None:
            return None
        squares, sums = found
        self._note(rows, squares)
        return sums if any(squares) else None

    def dropped_lengths(self, rows: slice, drop: Drop) -> list[list[float]]:
        """Return ‖Δᵢ‖₁ and ‖Δ̂ᵢ‖₁ of some rows, of each expert.

        Raises:
            NonFiniteValues: as `stack`.
        """
        start = rows.start * self.shape[1]
        lengths = dropped_lengths(self._base[rows], self._all_stored(rows), drop, start)
        if lengths is None:
            stack = self.stack(rows)
            kept = drop.of_block(rows, stack)
            return [[l1_norm(x), l1_norm(y)] for x, y in zip(stack, kept, strict=True)]
        if not all(math.isfinite(before) for before, _ in lengths):
            raise NonFiniteValues(self._culprit(rows))
        self._release(rows)
        return lengths

    def _all_stored(self, rows: slice) -> list[Tensor]:
        """Return the rows of all experts as stored, or none where some are not given so."""
        stored = [change.values for change in self._changes if isinstance(change, Dense)]
        if self._whole is not None or len(stored) < self.count:
            return []
        return [values[rows] for values in stored]

    def matrix(self, i: int) -> Tensor:
        """Return Δ_i whole, float32, shape (m, n); the memory may be reused by the next call."""
        if self._whole is not None:
            return self._whole[i]
        m, n = self.shape
        matrix = self._buffer("matrix", m * n).view(m, n)
        for rows in self.blocks():
            self._changes[i].subtract(self.base(rows), rows, matrix[rows])
            self._release(rows)
        return matrix

    def gram(self) -> Tensor:
        """Return D, D_ij = ⟨Δ_i, Δ_j⟩, float64, shape (N, N), on the CPU.

        Raises:
            NonFiniteValues: as `stack`.
        """
        if self.space is not None:
            return self.space.gram()

        def add(rows: slice) -> None:
            if not self._summed[self._number(rows)] and self._products(rows) is None:
                self._sum(rows, self._block_buffer(rows))

        self.cores.each_run(self.blocks(), add)
        # In the order of the rows, whatever the order in which they were first read.
        total = torch.zeros(self.count, self.count, dtype=torch.float64)
        for of_block in self._grams:
            total += of_block
        return total

    def whole_gram(self) -> Tensor:
        """Return the products of W0 and all Δ_i with one another, W0 first, as `gram`.

        Raises:
            NonFiniteValues: as `stack`.
        """

        size = self.count + 1
        grams = torch.zeros(len(self._grams), size, size, dtype=torch.float64)

        def add(rows: slice) -> None:
            products = self._products(rows)
            if products is None:
                stack, base = self.block(rows)
                products = gram([base, *stack])
                self._release(rows)
            grams[self._number(rows)] = products

        self.cores.each_run(self.blocks(), add)
        total = torch.zeros(size, size, dtype=torch.float64)
        for of_block in grams:
            total += of_block
        return total

    def is_unmoved(self, i: int) -> bool:
        """Return whether an expert has the base's values everywhere; ends at the first other."""
        change = self._changes[i]
        if isinstance(change, Dense):
            return self._are_equal(self._base, change.values)
        return not change.touches(slice(0, self.shape[0]))

    def are_alike(self, i: int, j: int) -> bool:
        """Return whether two experts give the same values, or the same factors, everywhere.

        Ends at the first difference. Values are not compared with factors: rounding parts them.
        """
        one, other = self._changes[i], self._changes[j]
        if isinstance(one, Dense) and isinstance(other, Dense):
            return self._are_equal(one.values, other.values)
        return are_same(one, other)

    def _are_equal(self, one: Tensor, other: Tensor) -> bool:
        """Return whether stored values are equal, block by block; ends at the first difference."""
        for rows in self.blocks():
            left, right = one[rows], other[rows]
            if left.dtype != right.dtype:
                left, right = left.float(), right.float()
            equal = torch.equal(left, right)
            if self._whole is None:
                self._release(rows)
            if not equal:
                return False
        return True

    def is_zero(self, rows: slice | None = None) -> bool:
        """Return whether every Δ_i is zero in a block that was read, or in the whole matrix."""
        if self.low_rank is not None:
            where = slice(0, self.shape[0]) if rows is None else rows
            return not any(change.touches(where) for change in self._changes)
        if rows is not None:
            return self._zero[self._number(rows)] is True
        for block in self.blocks():
            if self._zero[self._number(block)] is None:
                self.stack(block)
            if not self._zero[self._number(block)]:
                return False  # most often the first one tells
        return True

    def project(self, V: Tensor) -> Tensor:
        """Return Δ_j·V for all j, shape (N, m, c), of V's dtype.

        Args:
            V: shape (n, c), the same for all; or one V_j for each, shape (N, n, c).
        """
        if self.space is not None:
            return self.space.project(V).to(V.dtype)
        result = V.new_empty(self.count, self.shape[0], V.shape[-1])
        left = V.transpose(-1, -2).contiguous()

        def project(rows: slice) -> None:
            stack = self.stack(rows).to(V.dtype)
            # Vᵀ·Δᵀ rather than Δ·V: five times faster for few columns, slower for many.
            few = V.shape[-1] < _MANY_COLUMNS
            projected = torch.matmul(left, stack.mT).mT if few else torch.matmul(stack, V)
            result[:, rows] = projected

        self.cores.each_run(self.blocks(), project)
        return result

    def project_back(self, Y: Tensor) -> Tensor:
        """Return Δ_jᵀ·Y_j for all j, float64, shape (N, n, c): products in Y's dtype.

        Args:
            Y: shape (N, m, c).

        Memory: the result once more for each `PART_ROWS` rows, eight times at most.
        """
        if self.space is not None:
            return self.space.project_back(Y)
        blocks = self.blocks()
        # Sums of consecutive rows, cut by the shape alone; then these in order.
        parts = min(max(self.shape[0] // PART_ROWS, 1), PARTS, len(blocks))
        edges = [len(blocks) * part // parts for part in range(parts + 1)]

        def job(own: list[slice]) -> Callable[[], Tensor]:
            return lambda: self._back_of(own, Y)

        jobs = [job(blocks[a:b]) for a, b in itertools.pairwise(edges)]
        first, *others = self.cores.each(jobs)
        for other in others:
            first += other
        return first

    def _back_of(self, blocks: list[slice], Y: Tensor) -> Tensor:
        """Return ΣΔ_jᵀ·Y_j over some row blocks: float32 sums of a chunk of rows, these float64."""
        total = Y.new_zeros(self.count, self.shape[1], Y.shape[2], dtype=torch.float64)
        chunk, height = Y.new_zeros(total.shape), 0
        for rows in blocks:
            stack = self.stack(rows).to(Y.dtype)
            chunk.baddbmm_(stack.transpose(1, 2), Y[:, rows])
            height += rows.stop - rows.start
            if height >= CHUNK:
                total += chunk
                chunk.zero_()
                height = 0
        return total.add_(chunk)

    def _read(self, rows: slice) -> tuple[Tensor, Tensor | None]:
        """Return all Δ_i of some rows, and W0 where it had to be read for them."""
        if self._whole is not None:
            return self._whole[:, rows], None
        stack = self._block_buffer(rows)
        stored = self._all_stored(rows)
        products = differences(self._base[rows], stored, stack, all_pairs=False)
        if products is not None:
            self._note(rows, products.diagonal().tolist())
            return stack, None
        base = self._subtract(rows, stack)
        number = self._number(rows)
        if self._zero[number] is None:  # the squares tell what is not finite, and what is all zero
            self._note(rows, [dsdot(delta, delta) for delta in stack])
        return stack, base

    def _block_buffer(self, rows: slice) -> Tensor:
        """Return this thread's room for all Δ_i of some rows."""
        b, n = rows.stop - rows.start, self.shape[1]
        use = f"block of {threading.get_ident()}"
        return self._buffer(use, self.count * b * n).view(self.count, b, n)

    def _subtract(self, rows: slice, out: Tensor) -> Tensor:
        base = self.base(rows)
        for change, delta in zip(self._changes, out, strict=True):
            change.subtract(base, rows, delta)
        return base

    def _low_rank(self) -> list[LowRank] | None:
        found = [_factors_of(change, self.shape, self.device) for change in self._changes]
        whole = [factors for factors in found if factors is not None]
        if len(whole) < self.count:
            return None
        for i, factors in enumerate(whole):
            if not factors.is_finite():
                raise NonFiniteValues(i)
        return whole

    def _stored(self, matrix: Tensor, rows: slice) -> Tensor:
        """Return some rows on the device; they cross in their stored dtype, half of float32."""
        return matrix[rows].to(self._workspace.device)

    def _buffer(self, use: str, numel: int) -> Tensor:
        """Return the buffer of a use, lent until `close`; one as large as asked for at the most."""
        lent = self._lent.get(use)
        if lent is None or lent.numel() < numel:
            if lent is not None:
                self._workspace.give(lent)
            lent = self._lent[use] = self._workspace.take(numel)
        return lent[:numel]

    def _sum(self, rows: slice, out: Tensor) -> None:
        """Write all Δ_i of some rows, and keep their products."""
        stored = self._all_stored(rows)
        products = differences(self._base[rows], stored, out, all_pairs=True)
        if products is None:
            self._subtract(rows, out)
            products = gram(out)
        self._release(rows)
        self._note(rows, products.flatten().tolist())
        self._grams[self._number(rows)] = products
        self._summed[self._number(rows)] = True

    def _products(self, rows: slice) -> Tensor | None:
        """Return the products of W0 and all Δ_i of some rows, and keep those of the Δ_i.

        None where they can't be had without the Δ_i.
        """
        found = products(self._base[rows], self._all_stored(rows))
        if found is not None:
            of_deltas = found[1:, 1:]
            self._release(rows)
            self._note(rows, of_deltas.flatten().tolist())
            self._grams[self._number(rows)] = of_deltas
            self._summed[self._number(rows)] = True
        return found

    def _note(self, rows: slice, products: list[float]) -> None:
        if not all(map(math.isfinite, products)):
            raise NonFiniteValues(self._culprit(rows))
        self._zero[self._number(rows)] = not any(products)

    def _number(self, rows: slice) -> int:
        start: int = rows.start
        return start // self._step

    def _culprit(self, rows: slice) -> int:
        if not torch.isfinite(self._base[rows].float()).all():
            return -1
        for i, change in enumerate(self._changes):
            if not change.is_finite(rows):
                return i
        return 0  # finite, but the difference overflows


def _factors_of(change: Change, shape: tuple[int, int], device: torch.device) -> LowRank | None:
    if isinstance(change, Factored):
        return change.factors
    if isinstance(change, Unchanged):
        m, n = shape
        return LowRank(torch.zeros(m, 0, device=device), torch.zeros(n, 0, device=device))
    return None
