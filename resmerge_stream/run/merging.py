"""One tensor from stored bytes to stored bytes: task vectors, the method, the cast, the row.

In two steps, so that threads can work ahead: `prepare` merges (in any order), `finish` hands the
bytes over and keeps the tensor's row (in file order). Every operation runs on one thread, so the
number of threads changes no bit of the result.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..device import usable_cores
from ..errors import NonFiniteError
from ..maths.lanes import Lane, lanes_of
from ..maths.rounding import Kept, block_seed, cast
from ..maths.stored_bytes import Gathered, as_tensor, bytes_of
from ..maths.task_vectors import NonFiniteValues, TaskVectors
from ..methods import Rule, Site, Update
from ..pipes import Ahead
from ..planning.plan import Plan, PlannedTensor
from ..report.rows import ReportRow, tensor_entry
from ..specs import DTYPES
from .pieces import Piece


@dataclass(frozen=True, slots=True)
class Prepared:
    """A piece with its decision and, once merged, its output.

    Attributes:
        piece: as read.
        base, vectors, update: W0 as stored, task vectors, decision; None if carried through.
        kept: what the cast kept of the update so far.
        output: the merged bytes; None if they are merged as they are written.
        remarks: for the report, on how it was made.
    """

    piece: Piece
    base: Tensor | None = None
    vectors: TaskVectors | None = None
    update: Update | None = None
    kept: Kept = field(default_factory=Kept)
    output: memoryview | None = None
    remarks: list[str] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        """Bytes of the output."""
        return len(self.output) if self.output is not None else 0


@dataclass(frozen=True, slots=True)
class MergedRows:
    """A merged row block: its ΔW, float32; its bytes in the output dtype; what the cast kept."""

    delta: Tensor
    data: memoryview
    kept: Kept


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
        self.lanes = lanes_of(device, plan.working_bytes)
        self._seed = plan.options.seed
        self._layers = plan.layers
        self._stochastic = plan.options.rounding == "stochastic"
        self._sample = sample
        self._row: ReportRow | None = None

    def prepare(self, piece: Piece) -> Prepared:
        """Merge a piece: task vectors, decision, cast. Safe in any thread, in any order.

        Where a device's memory does not suffice, the next of `lanes` is tried.

        Raises:
            NonFiniteError: a weight is NaN or infinite, or overflows the output dtype.
        """
        if piece.tensor.rule is None:
            return Prepared(piece, output=piece.buffers[0])
        *all_but_last, last = self.lanes
        for lane in all_but_last:
            with contextlib.suppress(torch.OutOfMemoryError), lane.taken():
                return self._prepare(piece, piece.tensor.rule, lane)
            lane.make_room()
        with last.taken():
            return self._prepare(piece, piece.tensor.rule, last)

    def _prepare(self, piece: Piece, rule: Rule, lane: Lane) -> Prepared:
        with contextlib.ExitStack() as undo:
            try:
                base, vectors = self.open(piece, lane)
                undo.callback(vectors.close)
                prepared = self.decide(piece, base, vectors)
            except NonFiniteValues as exc:
                raise self.non_finite(piece.tensor, exc.source) from exc
            if self._plan.is_held(piece.tensor):
                gathered = Gathered(self._output_bytes(piece))
                self._write_all(prepared, gathered.append)
                prepared = replace(prepared, output=gathered.data)
            undo.pop_all()
        prepared.remarks.extend([lane.remark] if lane.remark else [])
        return prepared

    def open(self, piece: Piece, lane: Lane | None = None) -> tuple[Tensor, TaskVectors]:
        """Return the base as stored and the task vectors of a piece, by one of `lanes`.

        Raises:
            NonFiniteValues: some task vector is not finite.
        """
        lane = lane or self.lanes[0]
        torch.set_num_threads(1)
        rule, spec = piece.tensor.rule, piece.tensor.spec
        sources = self._plan.sources_of(piece.tensor)
        dtypes = [source.tensors[spec.name].spec.dtype for source in sources]
        raw = [
            lane.cross(as_tensor(buffer, dtype, piece.matrix_shape))
            for buffer, dtype in zip(piece.buffers, dtypes, strict=True)
        ]
        resident = rule is not None and rule.needs_matrix and piece.tensor.resident and lane.whole
        return raw[0], TaskVectors(
            raw[0], raw[1:], lane.workspace, resident=resident, release=piece.release
        )

    def decide(self, piece: Piece, base: Tensor, vectors: TaskVectors) -> Prepared:
        """Let the method decide about a piece that is open.

        Raises:
            NonFiniteValues: some task vector is not finite.
        """
        site = self.site(piece)
        if site.rule.needs_matrix and vectors.is_zero():
            update = Update(lambda block, stack: torch.zeros_like(stack[0]), "copy")
        else:
            update = piece.tensor.method.merge(vectors, site)
            self._sample()
        return Prepared(piece, base, vectors, update)

    def site(self, piece: Piece) -> Site:
        """Return where a piece is, as a method sees it."""
        spec, rule = piece.tensor.spec, piece.tensor.rule
        if rule is None:
            raise RuntimeError(f"{spec.name} is not merged")
        return Site(
            rule,
            piece.tensor.weights,
            block_seed(self._seed, spec.name, -1),
            spec=spec,
            start_row=piece.first_row,
            layers=self._layers,
            counted=self._plan.counted,
            experts=piece.tensor.experts,
            base_weight=piece.tensor.base_weight,
        )

    def finish(
        self, prepared: Prepared, write: Callable[[memoryview], None]
    ) -> dict[str, Any] | None:
        """Write a prepared piece; return the tensor's row of the report after its last one.

        Args:
            prepared: in file order.
            write: takes the next bytes of the file.
        """
        if prepared.output is None:
            self._write_all(prepared, write)
        else:
            write(prepared.output)
        piece = prepared.piece
        if piece.tensor.rule is None:
            return self.carried(piece.tensor) if piece.is_last else None
        return self.end(prepared)

    def _write_all(self, prepared: Prepared, write: Callable[[memoryview], object]) -> None:
        piece, vectors = prepared.piece, prepared.vectors
        if vectors is None:
            raise RuntimeError("this piece was not prepared")
        held = self._plan.is_held(piece.tensor) or self.device.type != "cpu"
        blocks = self._blocks(prepared, vectors) if held else self._blocks_ahead(prepared, vectors)
        try:
            for rows, merged in blocks:
                prepared.kept.absorb(merged.kept)
                write(merged.data)
                piece.release(rows)
        except NonFiniteValues as exc:
            raise self.non_finite(piece.tensor, exc.source) from exc
        self._sample()
        vectors.close()

    def _blocks(
        self, prepared: Prepared, vectors: TaskVectors
    ) -> Iterator[tuple[slice, MergedRows]]:
        """Merge row block after row block in this thread."""
        torch.set_num_threads(1)
        for rows in vectors.blocks():
            yield rows, self.merge_rows(prepared, rows, vectors.stack(rows), vectors.base(rows))

    def _blocks_ahead(
        self, prepared: Prepared, vectors: TaskVectors
    ) -> Iterator[tuple[slice, MergedRows]]:
        """Merge row blocks in threads: while a large tensor is written, the others have to wait."""

        def job(rows: slice) -> Callable[[], tuple[slice, MergedRows]]:
            def merge() -> tuple[slice, MergedRows]:
                torch.set_num_threads(1)
                stack = vectors.stack(rows)
                return rows, self.merge_rows(prepared, rows, stack, vectors.base(rows))

            return merge

        cores = usable_cores()
        jobs = ((1, job(rows)) for rows in vectors.blocks())
        with contextlib.closing(Ahead(jobs, cores, workers=cores)) as ahead:
            for held in ahead:
                yield held.value
                held.release()

    def merge_rows(
        self, prepared: Prepared, rows: slice, stack: Tensor, base: Tensor
    ) -> MergedRows:
        """Merge and cast a row block. Safe in any thread, in any order.

        Args:
            prepared: what was decided.
            rows: of the piece.
            stack, base: the task vectors and W0 there.

        Raises:
            NonFiniteError: a weight overflows the output dtype.
        """
        piece, vectors, update = prepared.piece, prepared.vectors, prepared.update
        if vectors is None or update is None or prepared.base is None:
            raise RuntimeError("this piece was not prepared")
        delta = update.rows(rows, stack)
        if vectors.is_zero(rows):
            merged = prepared.base[rows].to(self._dtype(piece))  # signed zeros included
        else:
            merged = cast(base + delta, self._dtype(piece), seed=self._cast_seed(piece, rows))
        kept = Kept()
        kept.add(delta, merged.to(base.device, torch.float32) - base)
        if kept.overflowed:
            raise NonFiniteError(
                f"{piece.tensor.spec.name} overflows {DTYPES[piece.tensor.spec.dtype].torch_name} "
                "after the merge. Give --dtype bfloat16 or float32, or smaller parameters."
            )
        return MergedRows(delta, bytes_of(merged), kept)

    def end(self, prepared: Prepared) -> dict[str, Any] | None:
        """Note that a piece is written; return the tensor's row of the report after its last."""
        piece, vectors, update = prepared.piece, prepared.vectors, prepared.update
        if vectors is None or update is None or piece.tensor.rule is None:
            raise RuntimeError("this piece was not prepared")
        row = self._row or ReportRow()
        row.add(update, prepared.kept, prepared.remarks, is_zero=vectors.is_zero())
        self._row = None if piece.is_last else row
        return row.entry(piece.tensor.spec, piece.tensor.rule) if piece.is_last else None

    def _output_bytes(self, piece: Piece) -> int:
        rows, columns = piece.matrix_shape
        return rows * columns * DTYPES[piece.tensor.spec.dtype].nbytes

    def _dtype(self, piece: Piece) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, DTYPES[piece.tensor.spec.dtype].torch_name)
        return dtype

    def _cast_seed(self, piece: Piece, rows: slice) -> int | None:
        if not self._stochastic:
            return None
        return block_seed(self._seed, piece.tensor.spec.name, piece.first_row + rows.start)

    def carried(self, tensor: PlannedTensor) -> dict[str, Any]:
        """Return the row of the report of a tensor that is not merged."""
        spec = tensor.spec
        role = tensor.method.rule_for(spec, len(self._plan.experts)).role.value
        return tensor_entry(
            name=spec.name, role=role, shape=list(spec.shape), rule="carried", changed_fraction=0.0
        )

    def non_finite(self, tensor: PlannedTensor, source: int) -> NonFiniteError:
        """Return the error that names a tensor and its checkpoint (−1: the base)."""
        checkpoint = self._plan.sources_of(tensor)[source + 1]
        return NonFiniteError(
            f"{tensor.spec.name} of {checkpoint.id} holds NaN or infinite values (or differences "
            "too large for float32). A merge would spread them; repair or replace that checkpoint."
        )
