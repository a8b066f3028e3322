"""One tensor from stored bytes to stored bytes: task vectors, the method, the cast.

In two steps, so that threads can work ahead: `prepare` decides and merges, in any thread and order;
`written` hands the bytes over, in file order. Every operation runs on one thread, so the number of
threads changes no bit of the result.
"""

import contextlib
import math
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..errors import NonFiniteError, Remedy
from ..maths.cores import Cores
from ..maths.dequantise import fp8_values
from ..maths.factoring import Place, fitted
from ..maths.lanes import Lane, lanes_of
from ..maths.low_rank import Factors, LowRank, balanced, svd
from ..maths.passes import moved
from ..maths.quantise import fp8_blocks, fp8_rounded
from ..maths.rounding import Kept, block_seed, cast
from ..maths.stored_bytes import Gathered, Recycled, as_tensor, bytes_of
from ..maths.task_vectors import NonFiniteValues, TaskVectors, block_rows
from ..memory import KEPT_OUTPUT_BYTES
from ..methods import Rule, Site, Update
from ..planning.plan import Plan, PlannedTensor
from ..planning.planned import OutputFactors
from ..report.rows import combine_slices
from ..report.values import Groups, groups_of, together
from ..sources.adapter import EditRows
from ..specs import DTYPES, FP8_BLOCK
from .changes import change_of
from .pieces import Assembly, Piece
from .pipeline import block_threads, blocks_ahead, threads_of, worked_ahead, workers
from .reading import READ_AHEAD_BYTES, reading_ahead_of, reads

R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class Carried:
    """A piece whose bytes go through as they were read."""

    piece: Piece

    @property
    def held_bytes(self) -> int:
        """What it holds while it waits to be written, beside what was read: nothing."""
        return 0


@dataclass(frozen=True, slots=True)
class Decided:
    """A piece with what the method decided.

    Attributes:
        piece: as read.
        rule: as planned.
        base: W0 as stored.
        vectors: its task vectors, open.
        update: the decision.
        remarks: for the report, on how it was made.
        factors: the same ΔW, where it is a product of factors; its SVD, where that was needed.
        unmoved: the experts that have changed nothing, here and before.
        alike: groups of experts that have changed the same, likewise.
    """

    piece: Piece
    rule: Rule
    base: Tensor
    vectors: TaskVectors
    update: Update
    remarks: tuple[str, ...] = ()
    factors: LowRank | None = None
    unmoved: tuple[int, ...] = ()
    alike: Groups = ()

    @property
    def is_copy(self) -> bool:
        """Whether no expert differs from the base, so that its bytes stay."""
        return self.vectors.is_zero() and not self.update.moves_base

    @property
    def held_bytes(self) -> int:
        """What it takes until it is written: its task vectors are open, its rows to be merged."""
        return self.piece.tensor.working_bytes


@dataclass(frozen=True, slots=True)
class Merged:
    """A piece merged ahead: its bytes wait until the file is there.

    Attributes:
        decided: the decision; its task vectors are closed.
        data: in the output dtype.
        kept: what the cast kept.
    """

    decided: Decided
    data: memoryview
    kept: Kept

    @property
    def held_bytes(self) -> int:
        """What it holds while it waits to be written."""
        return len(self.data)


Prepared = Carried | Decided | Merged


@dataclass(frozen=True, slots=True)
class MergedRows:
    """A merged row block: its bytes in the output dtype; what the cast kept."""

    data: memoryview
    kept: Kept


class Merger:
    """Merges the pieces of a plan's tensors. It keeps nothing of one piece for the next but memory.

    Args:
        plan: what is merged.
        device: where the arithmetic happens.
        counted: what the method's counting passes found.
        sample: called when much memory is in use.
        cores: shared with other mergers; its own when None.

    Attributes:
        cores: that matrices in work share.
        threads: that may be at work at once.
    """

    def __init__(
        self,
        plan: Plan,
        device: torch.device,
        counted: Mapping[str, Any] = MappingProxyType({}),
        sample: Callable[[], None] = lambda: None,
        cores: Cores | None = None,
    ) -> None:
        self.device = device
        self.plan = plan
        self.threads = threads_of(plan)
        self.cores = cores or Cores(self.threads)
        self.lanes = lanes_of(device, plan.working_bytes, self.cores)
        self.counted = counted
        self._layers = plan.layers
        self._memory = Recycled(KEPT_OUTPUT_BYTES)
        # The experts that have had no other value than the base's so far.
        self._unmoved = set(range(len(plan.experts)))
        # Those that have had the same values so far; of one that is listed twice, nobody asks.
        first = {expert.id: i for i, expert in reversed(list(enumerate(plan.experts)))}
        self._alike = groups_of([sorted(first.values())])
        self._sample = sample

    def prepare(self, piece: Piece) -> Prepared:
        """Decide about a piece, and merge it where its output may be held.

        Safe in any thread, in any order. Where a device's memory does not suffice, the next of
        `lanes` is tried.

        Raises:
            NonFiniteError: a weight is NaN or infinite, or overflows the output dtype.
        """
        rule = piece.tensor.rule
        if rule is None:
            return Carried(piece)
        *all_but_last, last = self.lanes
        for lane in all_but_last:
            with contextlib.suppress(torch.OutOfMemoryError), lane.taken():
                return self._prepare(piece, rule, lane)
            lane.make_room()
        with last.taken():
            return self._prepare(piece, rule, last)

    def _prepare(self, piece: Piece, rule: Rule, lane: Lane) -> Decided | Merged:
        with contextlib.ExitStack() as undo, self.naming(piece.tensor):
            if piece.tensor.factors is not None:
                return self._factored(piece, piece.tensor.factors, rule, lane)
            base, vectors = self.open(piece, lane)
            undo.callback(vectors.close)
            decided = self.decide(piece, rule, base, vectors)
            if lane.remark:
                decided = replace(decided, remarks=(lane.remark,))
            if not piece.tensor.is_held:
                undo.pop_all()
                return decided
            lane.workspace.leave_room(self._memory.lent_bytes + piece.tensor.output_bytes)
            if piece.tensor.is_quantised:
                return self._quantised(decided)
            gathered, kept = Gathered(piece.output_bytes, self._memory), Kept()
            merge = self._merging_of(decided, gathered)
            # What the casts kept is kept, and nothing more: it lies among the next blocks'
            # temporaries, and would keep the heap from shrinking.
            for of_block in vectors.cores.each_run(vectors.blocks(), lambda b: merge(b).kept):
                kept.absorb(of_block)
            self._sample()
            return Merged(decided, gathered.data, kept)

    def _quantised(self, decided: Decided) -> Merged:
        """Return the bytes of scales and codes. What was kept is between W0 and it, both in FP8.

        The row blocks are those of every other dtype, and so is the update.
        """
        tensor, vectors = decided.piece.tensor, decided.vectors
        gathered, kept = Gathered(tensor.output_bytes, self._memory), Kept()
        scales = tensor.spec.scales
        grid = torch.frombuffer(gathered.part(0, scales.nbytes), dtype=torch.float32)
        grid = grid.view(scales.shape)
        waiting: list[tuple[Tensor, Tensor]] = []
        first = 0
        for rows in vectors.blocks():
            delta, base = _delta_and_base(decided, rows)
            waiting.append((delta.cpu().clone(), base.cpu().clone()))  # the room is used again
            count = rows.stop - first
            decided.piece.release(rows)
            if count < FP8_BLOCK and rows.stop < vectors.shape[0]:
                continue
            delta, base = (torch.cat(parts) for parts in zip(*waiting, strict=True))
            ready = count if rows.stop == vectors.shape[0] else count // FP8_BLOCK * FP8_BLOCK
            waiting = [(delta[ready:].clone(), base[ready:].clone())] if ready < count else []
            delta, base = delta[:ready], base[:ready]
            codes, own = fp8_blocks(base + delta)
            back = torch.empty_like(base)
            fp8_values(codes, own, (FP8_BLOCK, FP8_BLOCK), (0, 0), back)
            kept.add(delta, back.sub_(fp8_rounded(base)))
            grid[first // FP8_BLOCK :][: len(own)] = own
            part = gathered.part(scales.nbytes + first * vectors.shape[1], codes.numel())
            part[:] = bytes_of(codes)
            first += ready
        self._checked(decided, gathered.data, kept)
        self._sample()
        return Merged(decided, gathered.data, kept)

    def _factored(self, piece: Piece, output: OutputFactors, rule: Rule, lane: Lane) -> Merged:
        """Return the bytes of A and B: the whole update as factors, of all its parts."""
        fused = piece.tensor.fused
        found: list[tuple[Place, LowRank | Tensor]] = []
        gates: list[dict[str, Any]] = []
        for part in (None,) if fused is None else range(len(fused.names)):
            own = replace(piece, part=part)
            base, vectors = self.open(own, lane)
            with contextlib.closing(vectors):
                decided = self.decide(own, rule, base, vectors)
                if decided.is_copy:
                    continue
                found.append((own.place, self._change(decided)))
                gates.append(dict(decided.update.gates))
        dtype: torch.dtype = getattr(torch, DTYPES[output.up.dtype].torch_name)
        result = fitted(piece.read_shape, found, output.rank, dtype)
        sides = (result.factors.left, result.factors.right)
        down, up = sides if output.flipped else sides[::-1]
        gathered = Gathered(piece.tensor.output_bytes, self._memory)
        gathered.append(bytes_of(down.T.contiguous()))
        gathered.append(bytes_of(up))
        self._sample()
        stored = {spec.name: list(spec.shape) for spec in piece.tensor.stored}
        shares = {str(rank): share for rank, share in result.shares.items()}
        of_adapter = {
            "rank": output.rank,
            "needed": result.needed,
            "kept": result.shares[output.rank],
            "by_rank": shares,
            "tensors": stored,
        }
        all_gates = gates[0] if len(gates) == 1 else combine_slices(gates) if gates else {}
        update = replace(decided.update, gates=all_gates | {"adapter": of_adapter})
        remarks = (lane.remark,) if lane.remark else ()
        decided = replace(decided, piece=piece, update=update, remarks=remarks)
        return Merged(decided, gathered.data, result.kept)

    def _change(self, decided: Decided) -> LowRank | Tensor:
        """Return ΔW: as factors where it has some and they are what is asked for, else whole."""
        if not decided.piece.tensor.reads_layout:
            if decided.factors is None:
                raise RuntimeError(f"{decided.piece.tensor.spec.name} has no update of low rank")
            return decided.factors
        whole = torch.empty(decided.vectors.shape)
        for rows in decided.vectors.blocks():
            stack = decided.vectors.stack(rows)
            whole[rows] = decided.update.rows(rows, stack).cpu()
        return whole

    def open(self, piece: Piece, lane: Lane | None = None) -> tuple[Tensor, TaskVectors]:
        """Return the base as stored and the task vectors of a piece, by one of `lanes`.

        Raises:
            NonFiniteValues: some task vector is not finite.
        """
        lane = lane or self.lanes[0]
        torch.set_num_threads(1)
        spec = piece.tensor.spec
        sources = piece.tensor.sources
        dtypes = [source.tensors[spec.name].spec.dtype for source in sources]
        shape = piece.read_shape
        if piece.tensor.reads_layout:
            base = lane.cross(piece.part_of(as_tensor(piece.layout_bytes, dtypes[0], shape)))
        else:
            base = lane.cross(torch.zeros(1, 1)).expand(piece.matrix_shape)  # nobody looks at it
        changes = [
            change_of(buffer, piece, sources[0], lane.cross)
            if isinstance(buffer, EditRows)
            else lane.cross(piece.part_of(as_tensor(buffer, dtype, shape)))
            for buffer, dtype in zip(piece.buffers[1:], dtypes[1:], strict=True)
        ]
        resident = piece.tensor.is_decomposed and piece.tensor.resident and lane.whole
        return base, TaskVectors(
            base, changes, lane.workspace, resident=resident, release=piece.release
        )

    def each(
        self,
        tensors: Sequence[PlannedTensor],
        work: Callable[[Piece], R],
        *,
        beside: Callable[[PlannedTensor], int] = lambda tensor: 0,
        on_read: Callable[[int], None] = lambda nbytes: None,
        tick: float | None = None,
    ) -> Generator[tuple[Piece, R] | None, None, None]:
        """Yield every piece of some tensors with what the work makes of it, in order.

        Args:
            tensors: of the plan.
            work: called in threads, in any order.
            beside: bytes that it takes for a piece of a tensor, beside what a merge takes.
            on_read: told how many bytes were read, piece by piece.
            tick: seconds after which None is yielded while the next result is not ready.
        """
        chain = worked_ahead(
            reads(tensors),
            lambda piece: (piece, work(piece)),
            read_bytes=self.plan.read_ahead_bytes or READ_AHEAD_BYTES,
            work_bytes=self.plan.working_bytes,
            cost=lambda piece: piece.tensor.working_bytes + beside(piece.tensor),
            workers=workers(self.device, self.threads),
            cores=self.cores,
            on_read=on_read,
            tick=tick,
        )
        with reading_ahead_of(self.plan, tensors), contextlib.closing(chain):
            yield from chain

    def decide(self, piece: Piece, rule: Rule, base: Tensor, vectors: TaskVectors) -> Decided:
        """Let the method decide about a piece that is open.

        Raises:
            NonFiniteValues: some task vector is not finite.
        """
        tensor = piece.tensor
        if rule.needs_matrix and tensor.base_weight is None and vectors.is_zero():
            update = Update(lambda block, stack: torch.zeros_like(stack[0]), "copy")
            factors: LowRank | None = None
        else:
            update = tensor.method.merge(vectors, self.site(piece, rule))
            found = update.factors(vectors)
            factors = found if tensor.factors is not None else None
            if found is not None and factors is None:
                update = from_factors(update, svd(found) if rule.needs_matrix else found)
            self._sample()
        unmoved, alike = self._still(piece, vectors)
        return Decided(
            piece, rule, base, vectors, update, factors=factors, unmoved=unmoved, alike=alike
        )

    def _still(self, piece: Piece, vectors: TaskVectors) -> tuple[tuple[int, ...], Groups]:
        """Return which experts have the base's values here, and which have the same as others.

        Of those alone that never had others: one difference is enough, and then it costs nothing
        to look on.
        """
        unmoved: list[int] = []
        for i, number in enumerate(piece.tensor.experts):
            if number not in self._unmoved:
                continue
            if vectors.is_unmoved(i):
                unmoved.append(number)
            else:
                self._unmoved.discard(number)
        place = {number: i for i, number in enumerate(piece.tensor.experts)}
        parts, elsewhere = list[list[int]](), list[list[int]]()
        for group in self._alike:
            elsewhere.append([number for number in group if number not in place])
            own: list[list[int]] = []
            for number in (number for number in group if number in place):
                for part in own:
                    both_unmoved = part[0] in unmoved and number in unmoved
                    if both_unmoved or vectors.are_alike(place[part[0]], place[number]):
                        part.append(number)
                        break
                else:
                    own.append([number])
            parts += own
        alike = groups_of(parts)
        # Where another thread does the same at the same time, some are only looked at once more.
        self._alike = together(self._alike, groups_of([*parts, *elsewhere]))
        return tuple(unmoved), alike

    def site(self, piece: Piece, rule: Rule) -> Site:
        """Return where a piece is, as a method sees it."""
        tensor = piece.tensor
        return Site(
            rule,
            tensor.weights,
            block_seed(self.plan.options.seed, tensor.spec.name, -1),
            spec=tensor.spec,
            start_row=piece.first_row,
            layers=self._layers,
            counted=self.counted,
            experts=tensor.experts,
            base_weight=tensor.base_weight,
        )

    def written(self, prepared: Prepared, assembly: Assembly) -> Kept:
        """Hand the bytes of a prepared piece over; return what the cast kept.

        Args:
            prepared: in file order.
            assembly: of the file.

        Raises:
            NonFiniteError: a weight is NaN or infinite, or overflows the output dtype.
        """
        if isinstance(prepared, Carried):
            assembly.of(prepared.piece)(prepared.piece.layout_bytes)
            return Kept()
        if isinstance(prepared, Merged):
            assembly.of(prepared.decided.piece)(prepared.data)
            return prepared.kept
        write, vectors, merge = (
            assembly.of(prepared.piece),
            prepared.vectors,
            self._merging_of(prepared),
        )
        # While a large tensor is written, the others have to wait: so its blocks go ahead.
        threads = block_threads(prepared.vectors, self.threads)
        kept = Kept()
        with (
            self.naming(prepared.piece.tensor),
            contextlib.closing(blocks_ahead(vectors.blocks(), merge, threads)) as blocks,
        ):
            for _, merged in blocks:
                kept.absorb(merged.kept)
                write(merged.data)
        self._sample()
        vectors.close()
        return kept

    def _merging_of(
        self, decided: Decided, gathered: Gathered | None = None
    ) -> Callable[[slice], MergedRows]:
        """Return what merges a row block; its bytes are in `gathered` if that is given."""
        vectors, of_sum = decided.vectors, decided.update.of_sum
        dtype = torch_dtype(decided.piece)
        row_bytes = vectors.shape[1] * dtype.itemsize

        def place(rows: slice) -> Tensor:
            shape = (rows.stop - rows.start, vectors.shape[1])
            if gathered is None or not math.prod(shape):
                return self._room(shape, dtype)
            part = gathered.part(rows.start * row_bytes, shape[0] * row_bytes)
            return torch.frombuffer(part, dtype=dtype).view(shape)

        def merge(rows: slice) -> MergedRows:
            out = place(rows)
            if of_sum is not None and of_sum.added is None and self._is_nearest:
                sums = vectors.write_sum(rows, of_sum.coefficients, of_sum.own, out, of_sum.drop)
                if sums is not None:
                    kept = Kept()
                    kept.add_sums(sums, out.numel())
                    return self._checked(decided, bytes_of(out), kept)
            return self.merge_rows(decided, rows, *_delta_and_base(decided, rows), out)

        def merge_and_release(rows: slice) -> MergedRows:
            merged = merge(rows)
            decided.piece.release(rows)
            return merged

        return merge_and_release

    def merge_rows(
        self,
        decided: Decided,
        rows: slice,
        delta: Tensor,
        base: Tensor,
        out: Tensor | None = None,
    ) -> MergedRows:
        """Add a row block's ΔW, and cast. Safe in any thread, in any order.

        Args:
            decided: what was decided.
            rows: of the piece.
            delta, base: ΔW and W0 there, float32.
            out: gets the weights, on the CPU, in the output dtype.

        Raises:
            NonFiniteError: a weight overflows the output dtype.
        """
        out = self._room(tuple(base.shape), torch_dtype(decided.piece)) if out is None else out
        kept = Kept()
        is_copy = decided.vectors.is_zero(rows) and not decided.update.moves_base
        sums = moved(base, delta, out) if self._is_nearest and not is_copy else None
        if sums is not None:
            kept.add_sums(sums, out.numel())
        else:
            # A copy is of the bytes, signed zeros included.
            merged = (
                decided.base[rows].to(out.dtype)
                if is_copy
                else self._cast(base + delta, out.dtype, decided, rows.start)
            )
            out.copy_(merged)
            back = merged.to(base.device, torch.float32)
            kept.add(delta, back - base if back is merged else back.sub_(base))
        return self._checked(decided, bytes_of(out), kept)

    def _room(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return room for weights of some rows, on the CPU."""
        nbytes = math.prod(shape) * dtype.itemsize
        if not nbytes:
            return torch.empty(shape, dtype=dtype)
        return torch.frombuffer(self._memory.take(nbytes), dtype=dtype).view(shape)

    @property
    def _is_nearest(self) -> bool:
        return self.plan.options.rounding != "stochastic"

    def _checked(self, decided: Decided, data: memoryview, kept: Kept) -> MergedRows:
        if kept.overflowed:
            spec = decided.piece.tensor.spec
            raise NonFiniteError(
                f"{spec.name} overflows {DTYPES[spec.dtype].torch_name} after the merge. "
                "Smaller parameters may help.",
                Remedy.WIDER_DTYPE,
            )
        return MergedRows(data, kept)

    def _cast(self, weights: Tensor, dtype: torch.dtype, decided: Decided, first: int) -> Tensor:
        """Return rows of a piece, from its row `first` on, in the output dtype."""
        options, piece = self.plan.options, decided.piece
        if options.rounding != "stochastic":
            return cast(weights, dtype)
        step = block_rows(*decided.vectors.shape)  # a CPU's, so that a GPU draws the same
        parts = []
        for start in range(0, len(weights), step):
            row = piece.first_row + first + start
            seed = block_seed(options.seed, piece.tensor.spec.name, row)
            parts.append(cast(weights[start : start + step], dtype, seed=seed))
        return torch.cat(parts)

    @contextlib.contextmanager
    def naming(self, tensor: PlannedTensor) -> Generator[None, None, None]:
        """Have values that are not finite reported by the names of tensor and checkpoint.

        Raises:
            NonFiniteError: in place of `NonFiniteValues`.
        """
        try:
            yield
        except NonFiniteValues as exc:
            checkpoint = tensor.sources[exc.source + 1]  # −1 is the base
            raise NonFiniteError(
                f"{tensor.spec.name} of {checkpoint.id} holds NaN or infinite values (or "
                "differences too large for float32). A merge would spread them; repair or replace "
                "that checkpoint."
            ) from exc


def torch_dtype(piece: Piece) -> torch.dtype:
    """Return the dtype in which a piece is written."""
    found: torch.dtype = getattr(torch, DTYPES[piece.tensor.spec.dtype].torch_name)
    return found


def _delta_and_base(decided: Decided, rows: slice) -> tuple[Tensor, Tensor]:
    """Return ΔW and W0 of a row block, float32."""
    vectors, update = decided.vectors, decided.update
    if not update.needs_stack:
        # From factors: no Δ is formed.
        return update.rows(rows, torch.empty(0)), vectors.base(rows)
    if update.of_sum is not None and update.of_sum.drop is None:
        total, base = vectors.summed(rows, update.of_sum.coefficients)
        if update.of_sum.own:
            total.add_(base * update.of_sum.own)
        return update.of_sum.finish(rows, total), base
    stack, base = vectors.block(rows)
    return update.rows(rows, stack), base


def from_factors(update: Update, factors: LowRank | Factors) -> Update:
    """Return an update that multiplies its factors, and needs no task vector.

    Those of a matrix that was decided whole are its own singular directions in float64, so that
    terms which cancel cost no digits.
    """
    product = balanced(factors) if isinstance(factors, Factors) else factors
    left, right = product.left.float(), product.right.float().T.contiguous()
    rows = lambda block, stack: left[block] @ right  # noqa: E731  # as methods give it
    return replace(update, rows=rows, needs_stack=False)
