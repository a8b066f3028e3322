"""What a merge reads, in which order, and what it lets go again."""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

from ..device import machine_share
from ..planning.plan import Plan, PlannedTensor
from ..sources import Checkpoint
from ..sources.adapter import AdapterCheckpoint, EditRows
from ..sources.ahead import Followed, reading_ahead
from ..sources.fetch import THREADS
from ..sources.view import made_bytes
from .pieces import Cut, Piece, cuts

# Bytes of sources that may be read ahead; from a folder these are mapped pages, not private memory.
READ_AHEAD_BYTES = 256_000_000


class _Rows:
    """Reads the pieces of a tensor in order; rows that hold several parts once for all of them."""

    def __init__(self) -> None:
        self._start: int | None = None
        self._buffers: list[memoryview | EditRows] = []

    def piece(self, tensor: PlannedTensor, sources: list[Checkpoint], cut: Cut) -> Piece:
        """Return the next piece."""
        name, start, stop = tensor.spec.name, cut.start_row, cut.stop_row
        if start != self._start:
            self._start = start
            self._buffers = [_read(source, name, start, stop) for source in sources]
            if not tensor.reads_layout:
                self._buffers.insert(0, memoryview(b""))
        buffers, is_done = self._buffers, cut.part in (None, tensor.parts - 1)
        release, close = _releaser(tensor, sources, start, stop), None
        if is_done:
            self._start, self._buffers = None, []
            close = _closer(name, sources, start, stop)
        return Piece(tensor, *cut, buffers, release, close or _keep)


def rows_of(plan: Plan, tensor: PlannedTensor, start: int, stop: int) -> Piece:
    """Return some rows of a tensor by themselves, which the merge reads again."""
    sources = plan.read_for(tensor)
    piece = _Rows().piece(tensor, sources, Cut(start, stop, None, True))
    return replace(piece, close=_keep)


def _keep() -> None:
    """Keep the buffers: the same rows are wanted again."""


def reads(plan: Plan, tensors: list[PlannedTensor]) -> Iterator[tuple[int, Callable[[], Piece]]]:
    """Yield what to read, in order: bytes and a function that reads them."""
    for tensor in tensors:
        name = tensor.spec.name
        sources = plan.read_for(tensor)
        rows = _Rows()
        for cut in cuts(tensor):
            start, stop = cut.start_row, cut.stop_row

            def read(
                tensor: PlannedTensor = tensor,
                sources: list[Checkpoint] = sources,
                cut: Cut = cut,
                rows: _Rows = rows,
            ) -> Piece:
                return rows.piece(tensor, sources, cut)

            # A view's rows take their own size once they are made, often more than what is read.
            held = (
                max(source.read_cost(name, start, stop), made_bytes(source, name, start, stop))
                for source in sources
            )
            yield sum(held), read


def _read(source: Checkpoint, name: str, start: int, stop: int) -> memoryview | EditRows:
    if isinstance(source, AdapterCheckpoint):
        return source.read_edit(name, start, stop)
    return source.read(name, start, stop)


def _releaser(
    tensor: PlannedTensor, sources: list[Checkpoint], start: int, stop: int
) -> Callable[[slice], None]:
    is_slice = len(tensor.spec.shape) == 3 and stop - start == 1

    def release(rows: slice) -> None:
        first, last = (start, stop) if is_slice else (start + rows.start, start + rows.stop)
        for source in sources:
            source.release(tensor.spec.name, first, last)

    return release


def _closer(name: str, sources: list[Checkpoint], start: int, stop: int) -> Callable[[], None]:
    def close() -> None:
        for source in sources:
            source.done_with(name, start, stop)

    return close


def reading_ahead_of(
    plan: Plan, tensors: Iterable[PlannedTensor | None]
) -> contextlib.AbstractContextManager[None]:
    """Let sources on the Hub know what will be read, across the shards."""
    remote = [s for s in plan.checkpoints if s.is_remote and isinstance(s, Followed)]

    def order() -> Iterator[tuple[Followed, str, int, int] | None]:
        for tensor in tensors:
            if tensor is None:
                yield None
                continue
            sources = [source for source in plan.read_for(tensor) if isinstance(source, Followed)]
            for start, stop, part, _ in cuts(tensor):
                if not part:
                    yield from ((source, tensor.spec.name, start, stop) for source in sources)

    connections = max(THREADS // machine_share()[1], 2)
    return reading_ahead(order(), remote, plan.read_ahead_bytes, connections)
