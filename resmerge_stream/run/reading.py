"""What a merge reads, in which order, and what it lets go again."""

import contextlib
from collections.abc import Callable, Iterable, Iterator

from ..device import machine_share
from ..planning.plan import Plan, PlannedTensor
from ..sources import Checkpoint
from ..sources.adapter import AdapterCheckpoint, EditRows
from ..sources.ahead import Followed, reading_ahead
from ..sources.fetch import THREADS
from ..sources.view import made_bytes
from .pieces import Piece, row_ranges

# Bytes of sources that may be read ahead; from a folder these are mapped pages, not private memory.
READ_AHEAD_BYTES = 256_000_000


def reads(plan: Plan, tensors: list[PlannedTensor]) -> Iterator[tuple[int, Callable[[], Piece]]]:
    """Yield what to read, in order: bytes and a function that reads them."""
    for tensor in tensors:
        name = tensor.spec.name
        sources = plan.sources_of(tensor)
        for start, stop, is_last in row_ranges(tensor):

            def read(
                tensor: PlannedTensor = tensor,
                sources: list[Checkpoint] = sources,
                start: int = start,
                stop: int = stop,
                is_last: bool = is_last,
            ) -> Piece:
                name = tensor.spec.name
                buffers = [_read(source, name, start, stop) for source in sources]
                release = _releaser(tensor, sources, start, stop)
                close = _closer(name, sources, start, stop)
                return Piece(tensor, start, stop, is_last, buffers, release, close)

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
            sources = [source for source in plan.sources_of(tensor) if isinstance(source, Followed)]
            for start, stop, _ in row_ranges(tensor):
                yield from ((source, tensor.spec.name, start, stop) for source in sources)

    connections = max(THREADS // machine_share()[1], 2)
    return reading_ahead(order(), remote, plan.read_ahead_bytes, connections)
