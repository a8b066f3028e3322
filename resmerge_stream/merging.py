"""One tensor from stored bytes to stored bytes: task vectors, the method, the cast, the row.

In two steps, so that threads can work ahead: `prepare` decides (the costly part, in any order),
`finish` writes (in file order). Every operation runs on one thread, so the number of threads
changes no bit of the result.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .errors import NonFiniteError
from .memory import PIECE_BYTES
from .methods import Rule, Site, Update
from .plan import Plan, PlannedTensor
from .report import combine_slices, tensor_entry
from .rounding import Kept, block_seed, cast
from .specs import DTYPES, TensorSpec
from .task_vectors import NonFiniteValues, TaskVectors, Workspace, as_tensor


@dataclass(frozen=True, slots=True)
class Piece:
    """Some rows of a tensor, read; for a stack [E, m, n] to decompose, one of its matrices.

    Attributes:
        tensor: as planned.
        start_row, stop_row: which rows (first axis) the buffers hold.
        is_last: whether these are the tensor's last rows.
        buffers: stored bytes of the base, then of each expert; of the base alone if carried.
        release: told which rows of the buffers are not needed for a while.
        close: called when the piece is merged; its buffers are not used any more.
    """

    tensor: PlannedTensor
    start_row: int
    stop_row: int
    is_last: bool
    buffers: list[memoryview]
    release: Callable[[slice], None] = lambda rows: None
    close: Callable[[], None] = lambda: None

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """Rows and columns of the matrix that these rows make."""
        spec, rule = self.tensor.spec, self.tensor.rule
        if rule is not None and rule.needs_matrix and len(spec.shape) == 3:
            return spec.shape[1], spec.shape[2]
        return self.stop_row - self.start_row, spec.matrix_shape[1]


@dataclass(frozen=True, slots=True)
class Prepared:
    """A piece with its decision; None for a piece that is carried through."""

    piece: Piece
    base: Tensor | None = None
    vectors: TaskVectors | None = None
    update: Update | None = None


@dataclass(slots=True)
class _Row:
    """What is known of a tensor while its pieces come."""

    kept: Kept = field(default_factory=Kept)
    gates: list[dict[str, Any]] = field(default_factory=list)
    rules: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


class Merger:
    """Merges the pieces of a plan's tensors.

    Args:
        plan: without problems.
        device: where the arithmetic happens.
        sample: called when much memory is in use.
    """

    def __init__(
        self, plan: Plan, device: torch.device, sample: Callable[[], None] = lambda: None
    ) -> None:
        self.device = device
        self._plan = plan
        self._method = plan.opened[1]
        self._workspace = Workspace(device, plan.working_bytes)
        self._seed = plan.options.seed
        self._stochastic = plan.options.rounding == "stochastic"
        self._sample = sample
        self._row: _Row | None = None

    def prepare(self, piece: Piece) -> Prepared:
        """Compute the task vectors of a piece and let the method decide. Safe in any thread.

        Raises:
            NonFiniteError: a weight is NaN or infinite.
        """
        rule, spec = piece.tensor.rule, piece.tensor.spec
        if rule is None:
            return Prepared(piece)
        torch.set_num_threads(1)
        dtypes = [source.tensors[spec.name].spec.dtype for source in self._plan.checkpoints]
        raw = [
            as_tensor(buffer, dtype, piece.matrix_shape)
            for buffer, dtype in zip(piece.buffers, dtypes, strict=True)
        ]
        try:
            return Prepared(piece, raw[0], *self._decide(piece, rule, raw))
        except NonFiniteValues as exc:
            raise self._non_finite(spec, exc.source) from exc

    def finish(
        self, prepared: Prepared, write: Callable[[memoryview], None]
    ) -> dict[str, Any] | None:
        """Write a prepared piece; return the tensor's row of the report after its last one.

        Args:
            prepared: in file order.
            write: takes the next bytes of the file.

        Raises:
            NonFiniteError: a weight is NaN or infinite, or overflows the output dtype.
        """
        piece = prepared.piece
        spec, rule = piece.tensor.spec, piece.tensor.rule
        if rule is None:
            write(piece.buffers[0])
            return self._carried(spec) if piece.is_last else None
        if self._row is None:
            self._row = _Row()
        row = self._row
        try:
            self._write(prepared, row, write)
        except NonFiniteValues as exc:
            raise self._non_finite(spec, exc.source) from exc
        if not piece.is_last:
            return None
        self._row = None
        return _entry(spec, rule, row)

    def _decide(self, piece: Piece, rule: Rule, raw: list[Tensor]) -> tuple[TaskVectors, Update]:
        resident = rule.needs_matrix and piece.tensor.resident
        vectors = TaskVectors(
            raw[0], raw[1:], self._workspace, resident=resident, release=piece.release
        )
        if rule.needs_matrix and vectors.is_zero():
            return vectors, Update(lambda block, stack: torch.zeros_like(stack[0]), "copy")
        seed = block_seed(self._seed, piece.tensor.spec.name, -1)
        update = self._method.merge(vectors, Site(rule, self._plan.weights, seed))
        self._sample()
        return vectors, update

    def _write(self, prepared: Prepared, row: _Row, write: Callable[[memoryview], None]) -> None:
        piece, vectors, update = prepared.piece, prepared.vectors, prepared.update
        if vectors is None or update is None or prepared.base is None:
            raise RuntimeError("this piece was not prepared")
        torch.set_num_threads(1)
        for rows in vectors.blocks():
            delta = update.rows(rows, vectors.stack(rows))
            base = vectors.base(rows)
            if vectors.is_zero(rows):
                merged = prepared.base[rows].to(self._dtype(piece))  # signed zeros included
            else:
                merged = cast(base + delta, self._dtype(piece), seed=self._cast_seed(piece, rows))
            row.kept.add(delta, merged.to(base.device, torch.float32) - base)
            if row.kept.overflowed:
                raise _overflow(piece.tensor.spec)
            write(_bytes_of(merged))
            piece.release(rows)
        self._sample()
        row.rules.append("copy" if vectors.is_zero() else update.rule)
        row.warnings += [text for text in update.warnings if text not in row.warnings]
        if update.gates:
            row.gates.append(dict(update.gates))
        vectors.close()

    def _dtype(self, piece: Piece) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, DTYPES[piece.tensor.spec.dtype].torch_name)
        return dtype

    def _cast_seed(self, piece: Piece, rows: slice) -> int | None:
        if not self._stochastic:
            return None
        # Rows of the whole tensor as a matrix, so that the cut into pieces does not matter.
        first = piece.start_row * (
            piece.matrix_shape[0] if len(piece.tensor.spec.shape) == 3 else 1
        )
        return block_seed(self._seed, piece.tensor.spec.name, first + rows.start)

    def _carried(self, spec: TensorSpec) -> dict[str, Any]:
        role = self._method.rule_for(spec, len(self._plan.experts)).role.value
        return tensor_entry(
            name=spec.name, role=role, shape=list(spec.shape), rule="carried", changed_fraction=0.0
        )

    def _non_finite(self, spec: TensorSpec, source: int) -> NonFiniteError:
        checkpoint = list(self._plan.checkpoints)[source + 1]
        return NonFiniteError(
            f"{spec.name} of {checkpoint.id} holds NaN or infinite values (or differences too "
            "large for float32). A merge would spread them; repair or replace that checkpoint."
        )


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


def _overflow(spec: TensorSpec) -> NonFiniteError:
    return NonFiniteError(
        f"{spec.name} overflows {DTYPES[spec.dtype].torch_name} after the merge. "
        "Give --dtype bfloat16 or float32, or smaller parameters."
    )


def _bytes_of(tensor: Tensor) -> memoryview:
    flat = tensor.cpu().contiguous().flatten().view(torch.uint8)
    return memoryview(flat.numpy())  # type: ignore[arg-type]  # numpy's stubs lack Buffer on 3.11


def _entry(spec: TensorSpec, rule: Rule, row: _Row) -> dict[str, Any]:
    gates: dict[str, Any] = {}
    if len(row.gates) == 1 and len(row.rules) == 1:
        gates = row.gates[0]
    elif row.gates:
        gates = combine_slices(row.gates)
    applied = [name for name in row.rules if name != "copy"]
    return tensor_entry(
        **gates,
        name=spec.name,
        role=rule.role.value,
        shape=list(spec.shape),
        dtype=spec.dtype,
        rule=Counter(applied).most_common(1)[0][0] if applied else "copy",
        update_norm=row.kept.update_norm,
        kept_norm=row.kept.kept_norm,
        kept_cosine=row.kept.kept_cosine,
        changed_fraction=row.kept.changed_fraction,
        warnings=row.warnings,
    )
