"""The chain that merge, compare, analyse and counting share: read ahead, work ahead, take in order.

    reads ─▶ reader (1 thread) ─▶ workers (a core each) ─▶ the caller, in file order

Each stage is bounded in bytes, and what the caller has taken is given back when it asks for more.
"""

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from functools import partial
from typing import Protocol, TypeVar

import torch

from ..device import usable_cores
from ..maths.cores import Cores
from ..maths.task_vectors import TaskVectors
from ..pipes import Held, WorkAhead
from ..planning.plan import Plan


class Readable(Protocol):
    """What is read: a piece, or one that several plans share."""

    @property
    def nbytes(self) -> int:
        """Bytes that were read."""
        ...

    def close(self) -> None:
        """Let the bytes go."""
        ...


P = TypeVar("P", bound=Readable)
R = TypeVar("R")
T = TypeVar("T")


def worked_ahead(
    reads: Iterable[tuple[int, Callable[[], P]]],
    work: Callable[[P], R],
    *,
    read_bytes: int,
    work_bytes: int,
    cost: Callable[[P], int],
    workers: int,
    cores: Cores,
    keeps: Callable[[R], int] | None = None,
    on_read: Callable[[int], None] = lambda nbytes: None,
    tick: float | None = None,
) -> Generator[R | None, None, None]:
    """Yield what the work makes of everything that is read, in the order of the reads.

    Args:
        reads: bytes and a function that reads them; taken by one thread, ahead.
        work: called in `workers` threads, in any order. What it returns is the caller's until it
            asks for the next; then the bytes that were read are let go.
        read_bytes: that may be read and not yet let go.
        work_bytes: that may be in work, or done and not yet taken.
        cost: bytes that a piece takes while it is in work.
        workers: threads.
        cores: of which each takes one while it works; idle ones help the others.
        keeps: bytes that a result holds once it is made; all that its work took when None.
        on_read: told how many bytes were read, piece by piece.
        tick: seconds after which None is yielded while the next result is not ready.

    Closing it ends all threads; an error of a read or of the work is raised in its turn.
    """
    reader = WorkAhead(reads, read_bytes)
    reading: deque[Held[P]] = deque()  # in the order of the results

    def do(piece: P) -> R:
        with cores.taken():
            return work(piece)

    def jobs() -> Iterator[tuple[int, Callable[[], R]]]:
        for held in reader:
            on_read(held.value.nbytes)
            reading.append(held)
            yield cost(held.value), partial(do, held.value)

    worker = WorkAhead(jobs(), work_bytes, workers=workers, keeps=keeps)
    try:
        for done in worker.within(tick):
            if done is None:
                yield None
                continue
            yield done.value
            held = reading.popleft()
            held.value.close()
            held.free()
            done.free()
            del done, held  # what it holds is not to outlive the wait for the next one
    finally:
        # The reader first: a worker that waits for a piece would never end, nor would its closing.
        reader.close()
        worker.close()


def blocks_ahead(
    blocks: Iterable[slice], merge: Callable[[slice], T], threads: int
) -> Generator[tuple[slice, T], None, None]:
    """Yield the row blocks of a tensor with what `merge` makes of them, in order.

    Args:
        blocks: of one tensor.
        merge: called in any order where there is more than one thread.
        threads: 1 works in the caller's; more let no core wait while a large tensor is written.
    """
    blocks = list(blocks)
    if threads == 1 or len(blocks) == 1:
        torch.set_num_threads(1)
        for rows in blocks:
            yield rows, merge(rows)
        return

    def job(rows: slice) -> T:
        torch.set_num_threads(1)  # every thread has a number of its own
        return merge(rows)

    ahead = WorkAhead(((1, partial(job, rows)) for rows in blocks), threads, workers=threads)
    try:
        for rows, held in zip(blocks, ahead, strict=True):
            yield rows, held.value
            held.free()
    finally:
        ahead.close()


def block_threads(vectors: TaskVectors, threads: int) -> int:
    """Return how many row blocks of a tensor are in work at once, while nothing else can be."""
    is_alone = vectors.device.type != "cpu" or vectors.has_large_blocks
    return 1 if is_alone else threads


def threads_of(plan: Plan) -> int:
    """Return how many threads are at work at once: one a core, where they have the memory."""
    return min(plan.threads, usable_cores())


def workers(device: torch.device, threads: int) -> int:
    """Return how many tensors are in work at once: one a core; on a GPU one while one crosses."""
    return threads if device.type == "cpu" else 2
