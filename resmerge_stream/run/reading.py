"""What a merge reads, in which order, and what it lets go again.

Several plans over the same sources read once: the coarsest cut serves all of them.
"""

import contextlib
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Generic, TypeVar

from ..device import machine_share
from ..planning.plan import Plan, PlannedTensor
from ..sources.adapter import Adapter, EditRows
from ..sources.ahead import THREADS, Ahead, ByteRange
from .pieces import Cut, Piece, cuts

K = TypeVar("K", bound=Hashable)

# Bytes that may be open ahead where nothing is fetched. They are mapped, and nothing is read before
# it is worked on; so many, that two of the largest matrices of a 70B model are in work at once.
READ_AHEAD_BYTES = 4_000_000_000


class _Rows:
    """Reads the pieces of a tensor in order; rows that hold several parts once for all of them."""

    def __init__(self, tensor: PlannedTensor) -> None:
        self._tensor = tensor
        self._rows: slice | None = None
        self._buffers: list[memoryview | EditRows] = []

    def piece(self, cut: Cut) -> Piece:
        """Return the next piece."""
        tensor, rows = self._tensor, cut.rows
        name = tensor.spec.name
        if rows != self._rows:
            self._rows = rows
            self._buffers = [
                source.read_edit(name, rows)
                if isinstance(source, Adapter)
                else source.read(name, rows)
                for source in tensor.read
            ]
            if not tensor.reads_layout:
                self._buffers.insert(0, memoryview(b""))
        is_slice = len(tensor.spec.shape) == 3 and rows.stop - rows.start == 1

        def release(of_piece: slice) -> None:
            first: int = rows.start
            own = rows if is_slice else slice(first + of_piece.start, first + of_piece.stop)
            for source in tensor.read:
                source.release(name, own)

        def close() -> None:
            for source in tensor.read:
                source.done_with(name, rows)

        if cut.part not in (None, tensor.parts - 1):
            return Piece(tensor, *cut, self._buffers, release)
        buffers = self._buffers
        self._rows, self._buffers = None, []
        return Piece(tensor, *cut, buffers, release, close)


def rows_of(tensor: PlannedTensor, rows: slice) -> Piece:
    """Return some rows of a tensor by themselves, which the merge reads again."""
    piece = _Rows(tensor).piece(Cut(rows, None, True))
    return replace(piece, close=lambda: None)


def reads(tensors: Iterable[PlannedTensor]) -> Iterator[tuple[int, Callable[[], Piece]]]:
    """Yield what to read, in order: bytes and a function that reads them."""
    for tensor in tensors:
        name, rows = tensor.spec.name, _Rows(tensor)
        for cut in cuts(tensor):
            # Rows that are made take their own size, often more than what is read of them.
            held = sum(
                max(source.read_cost(name, cut.rows), source.made_bytes(name, cut.rows))
                for source in tensor.read
            )
            yield held, partial(rows.piece, cut)


@contextlib.contextmanager
def reading_ahead_of(plan: Plan, tensors: Iterable[PlannedTensor | None]) -> Iterator[None]:
    """Read ahead from sources on the Hub while the context lasts, across the shards.

    Args:
        plan: whose sources are read.
        tensors: in the order in which they are; None where what comes next is not known yet.
    """
    stores = [source.store for source in plan.checkpoints if source.is_remote]

    def order() -> Iterator[ByteRange | None]:
        for tensor in tensors:
            if tensor is None:
                yield None
                continue
            for rows, part, _ in cuts(tensor):
                if not part:
                    for source in tensor.read:
                        yield from source.spans(tensor.spec.name, rows)

    if not stores:
        yield
        return
    ahead = Ahead(order(), plan.read_ahead_bytes, max(THREADS // machine_share()[1], 2))
    for store in stores:
        store.ahead = ahead
    try:
        yield
    finally:
        for store in stores:
            store.ahead = None
        ahead.close()


@dataclass(frozen=True, slots=True)
class Shared(Generic[K]):
    """A piece that was read once, as each plan sees it.

    Attributes:
        lead: the plan whose cut it is.
        pieces: the piece by plan, with that plan's rule.
    """

    lead: K
    pieces: Mapping[K, Piece]

    @property
    def lead_piece(self) -> Piece:
        """The piece as the leading plan sees it."""
        return self.pieces[self.lead]

    @property
    def nbytes(self) -> int:
        """Bytes that were read."""
        return self.lead_piece.nbytes

    def close(self) -> None:
        """Let the bytes go."""
        self.lead_piece.close()


def shared_reads(
    plans: Mapping[K, Plan], names: Sequence[str]
) -> Iterator[tuple[int, Callable[[], Shared[K]]]]:
    """Yield what to read, in order: bytes and a function that reads them.

    A tensor of which not all plans merge the same experts is read once for each choice.
    Stacks [E, m, n] and fused matrices are read one by one for the methods that decompose them and
    once more for those that do not; everything else is read once.
    """
    for members, lead, tensor in _led(plans, names):
        for size, read in reads([tensor]):

            def load(
                members: Mapping[K, Plan] = members,
                lead: K = lead,
                read: Callable[[], Piece] = read,
                name: str = tensor.spec.name,
            ) -> Shared[K]:
                piece = read()
                pieces = {
                    key: replace(piece, tensor=plan.tensors[name]) for key, plan in members.items()
                }
                return Shared(lead, pieces)

            yield size, load


def shared_order(plans: Mapping[K, Plan], names: Iterable[str]) -> Iterator[PlannedTensor]:
    """Yield the tensors whose cut `shared_reads` follows, in its order."""
    return (tensor for _, _, tensor in _led(plans, names))


def _led(
    plans: Mapping[K, Plan], names: Iterable[str]
) -> Iterator[tuple[dict[K, Plan], K, PlannedTensor]]:
    """Yield plans that share a reading of a tensor, whose cut it is, and the tensor there."""

    def coarseness(tensor: PlannedTensor) -> int:
        rule = tensor.rule
        if rule is None:
            return 0
        return 2 + rule.copies if rule.needs_matrix else int(not rule.in_pieces)

    for name in names:
        groups: dict[Hashable, dict[K, Plan]] = {}
        for key, plan in plans.items():
            tensor = plan.tensors[name]
            groups.setdefault((tensor.is_stack, tensor.fused, tensor.experts), {})[key] = plan
        for members in groups.values():
            tensors = {key: plan.tensors[name] for key, plan in members.items()}
            lead = max(members, key=lambda key: coarseness(tensors[key]))
            yield members, lead, tensors[lead]
