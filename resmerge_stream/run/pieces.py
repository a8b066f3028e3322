"""How a tensor is cut into what is read and merged at once."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from ..memory import PIECE_BYTES
from ..planning.plan import PlannedTensor
from ..sources.adapter import EditRows
from ..specs import DTYPES


@dataclass(frozen=True, slots=True)
class Piece:
    """Some rows of a tensor, read; for a stack [E, m, n] to decompose, one of its matrices.

    Attributes:
        tensor: as planned.
        start_row, stop_row: which rows (first axis) the buffers hold.
        is_last: whether these are the tensor's last rows.
        buffers: stored bytes of the layout's model, then of each expert that takes part, or what
            an adapter stores about these rows; of the first alone if carried.
        release: told which rows of the buffers are not needed for a while.
        close: called when the piece is merged; its buffers are not used any more.
    """

    tensor: PlannedTensor
    start_row: int
    stop_row: int
    is_last: bool
    buffers: Sequence[memoryview | EditRows]
    release: Callable[[slice], None] = lambda rows: None
    close: Callable[[], None] = lambda: None

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers."""
        return sum(len(buffer) for buffer in self.buffers)

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
        return self.start_row * (self.matrix_shape[0] if self.is_slice else 1)

    @property
    def is_slice(self) -> bool:
        """Whether this is one matrix of a stack [E, m, n] that is decomposed."""
        rule = self.tensor.rule
        return rule is not None and rule.needs_matrix and len(self.tensor.spec.shape) == 3

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """Rows and columns of the matrix that these rows make."""
        spec = self.tensor.spec
        if self.is_slice:
            return spec.shape[1], spec.shape[2]
        return self.stop_row - self.start_row, spec.matrix_shape[1]


def row_ranges(tensor: PlannedTensor) -> Iterator[tuple[int, int, bool]]:
    """Yield (start row, stop row, last) of the pieces that a tensor is read in.

    The cut depends on the tensor alone, so that it changes no bit whatever the machine.
    """
    rows, _ = tensor.spec.matrix_shape
    step = max(rows, 1)
    if tensor.rule is not None and tensor.rule.needs_matrix:
        step = 1 if len(tensor.spec.shape) == 3 else step
    elif tensor.rule is None or tensor.rule.in_pieces:
        step = max(PIECE_BYTES * rows // max(tensor.spec.nbytes, 1) // 16 * 16, 16)
    starts = range(0, max(rows, 1), step)
    for start in starts:
        yield start, min(start + step, rows), start == starts[-1]
