"""How a tensor is cut into what is read and merged at once, and put together again."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ..maths.lazy import Tensor, np
from ..memory import PIECE_BYTES
from ..planning.plan import PlannedTensor
from ..sources.adapter import EditRows
from ..specs import DTYPES


@dataclass(frozen=True, slots=True)
class Piece:
    """Some rows of a tensor, read; for a stack [E, m, n] to decompose, one of its matrices.

    Attributes:
        tensor: as planned.
        rows: which rows (first axis) the buffers hold.
        part: which of the matrices that take turns, lie side by side or turned in these rows;
            else None.
        is_last: whether these are the tensor's last rows.
        buffers: stored bytes of the layout's model, then of each expert that takes part, or what
            an adapter stores about these rows; of the first alone if carried.
        release: told which rows of the buffers are not needed for a while.
        close: called when the piece is merged; its buffers are not used any more.
    """

    tensor: PlannedTensor
    rows: slice
    part: int | None
    is_last: bool
    buffers: Sequence[memoryview | EditRows]
    release: Callable[[slice], None] = lambda rows: None
    close: Callable[[], None] = lambda: None

    @property
    def nbytes(self) -> int:
        """Bytes that were read: those of the buffers, which the first of several parts reads."""
        return 0 if self.part else sum(len(buffer) for buffer in self.buffers)

    @property
    def output_bytes(self) -> int:
        """Bytes of these rows as they are written."""
        rows, columns = self.matrix_shape
        return rows * columns * DTYPES[self.tensor.spec.dtype].nbytes

    @property
    def layout_bytes(self) -> memoryview:
        """Stored bytes of the layout's model."""
        stored = self.buffers[0]
        if isinstance(stored, EditRows):
            raise RuntimeError(f"the layout of {self.tensor.spec.name} is an adapter")
        return stored

    @property
    def first_row(self) -> int:
        """Row of the whole tensor, as a matrix, where this piece begins; for seeds."""
        first: int = self.rows.start
        if self.part is not None:
            first = first * self.tensor.parts + self.part
        return first * (self.matrix_shape[0] if self.is_slice else 1)

    @property
    def is_slice(self) -> bool:
        """Whether this is one matrix of a stack [E, m, n] that is decomposed."""
        return self.tensor.is_stack

    @property
    def read_shape(self) -> tuple[int, int]:
        """Rows and columns of the matrix that the buffers hold."""
        spec = self.tensor.spec
        if self.is_slice:
            return spec.shape[1], spec.shape[2]
        return self.rows.stop - self.rows.start, spec.matrix_shape[1]

    @property
    def is_turned(self) -> bool:
        """Whether what is merged is the transpose of what is read."""
        return self.part is not None and self.tensor.fused is not None and self.tensor.fused.turned

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """Rows and columns of the matrix that is merged: all that is read, or a part, or turned."""
        fused = self.tensor.fused
        if self.part is None or fused is None:
            return self.read_shape
        return fused.shape(*self.read_shape)

    @property
    def place(self) -> tuple[slice, slice]:
        """Which rows and columns of what is read are merged."""
        fused = self.tensor.fused
        if self.part is None or fused is None:
            return slice(None), slice(None)
        return fused.place(self.part, *self.read_shape)

    def part_of(self, read: "Tensor") -> "Tensor":
        """Return the matrix that is merged, of what is read; a copy where it is turned.

        Args:
            read: shape `read_shape`.
        """
        part = read[self.place]
        # Sums depend on how a matrix lies in memory: so it lies as its own layer would store it.
        return part.T.contiguous() if self.is_turned else part


class Cut(NamedTuple):
    """Where a piece lies in its tensor; see `Piece`."""

    rows: slice
    part: int | None
    is_last: bool


def cuts(tensor: PlannedTensor) -> Iterator[Cut]:
    """Yield the pieces that a tensor is read in, in order.

    The cut depends on the tensor alone, so that it changes no bit whatever the machine.
    """
    rows, _ = tensor.spec.matrix_shape
    step = max(rows, 1)
    parts: Sequence[int | None] = (None,)
    if tensor.factors is not None or tensor.is_quantised:
        pass  # factors are those of all of it, and scales stand before it
    elif tensor.is_decomposed:
        step = tensor.rows_read
        if tensor.fused is not None and (tensor.is_stack or step == rows):
            parts = range(tensor.parts)
    elif tensor.rule is None or tensor.rule.in_pieces:
        step = max(PIECE_BYTES * rows // max(tensor.spec.nbytes, 1) // 16 * 16, 16)
    starts = range(0, max(rows, 1), step)
    for start in starts:
        for part in parts:
            is_last = start == starts[-1] and part == parts[-1]
            yield Cut(slice(start, min(start + step, rows)), part, is_last)


class Assembly:
    """Hands the bytes of merged pieces on as the file has them.

    Parts of the same rows come one after the other: they wait for the last one.

    Args:
        write: takes the next bytes of the file.
    """

    def __init__(self, write: Callable[[memoryview], object]) -> None:
        self._write = write
        self._parts: list[bytearray] = []

    def of(self, piece: Piece) -> Callable[[memoryview], object]:
        """Return what takes the bytes of a piece, in order."""
        fused = piece.tensor.fused
        if piece.part is None or fused is None or fused.in_rows:
            return self._write
        held = bytearray()
        self._parts.append(held)
        (m, n), size = piece.read_shape, DTYPES[piece.tensor.spec.dtype].nbytes

        def take(data: memoryview) -> None:
            held.extend(data)
            if len(held) < piece.output_bytes or len(self._parts) < piece.tensor.parts:
                return
            whole = np.empty((m, n, size), np.uint8)
            for number, own in enumerate(self._parts):
                part = np.frombuffer(own, np.uint8).reshape(*fused.shape(m, n), size)
                part = part.swapaxes(0, 1) if fused.turned else part
                whole[fused.place(number, m, n)] = part
            self._write(memoryview(whole.reshape(-1)))  # type: ignore[arg-type]  # as bytes_of
            self._parts.clear()

        return take
