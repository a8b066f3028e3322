"""Cores that matrices in work share: those without a matrix of their own help with another's."""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Generic, TypeVar

import torch

T = TypeVar("T")
# Row blocks that one job does: a thread takes 0.1 ms to start, a block about 0.5 ms.
_BLOCKS = 8


class Cores:
    """Counts the cores that nobody uses.

    What is done does not depend on how many help: jobs are cut by the matrix, and their results
    come in their order.

    Args:
        count: of cores.
    """

    def __init__(self, count: int) -> None:
        self._idle = count
        self._lock = threading.Lock()

    @contextmanager
    def taken(self) -> Iterator[None]:
        """Work with a core; who helps elsewhere with it stops after the job in hand."""
        with self._lock:
            self._idle -= 1
        try:
            yield
        finally:
            with self._lock:
                self._idle += 1

    def each(self, jobs: Sequence[Callable[[], T]]) -> list[T]:
        """Return what the jobs return: the caller does them, with all cores that are idle.

        Args:
            jobs: called in any thread, each in one; started in their order.

        Raises:
            BaseException: what the first of the jobs raised that failed; no more are started.
        """
        if len(jobs) < 2:
            return [job() for job in jobs]
        shared = _Shared(jobs)
        helpers: list[threading.Thread] = []
        while (number := shared.take()) is not None:
            self._call_helpers(shared, helpers)
            shared.do(number)
        for helper in helpers:
            helper.join()
        return shared.finish()

    def each_run(self, blocks: Sequence[slice], work: Callable[[slice], T]) -> list[T]:
        """Return what the work makes of each row block, in order; a few blocks are one job."""

        def job(run: Sequence[slice]) -> Callable[[], list[T]]:
            return lambda: [work(rows) for rows in run]

        runs = [blocks[start : start + _BLOCKS] for start in range(0, len(blocks), _BLOCKS)]
        return [made for run in self.each([job(run) for run in runs]) for made in run]

    def _call_helpers(self, shared: "_Shared[T]", helpers: list[threading.Thread]) -> None:
        """Start a thread for each idle core, while there are jobs left."""
        for _ in range(shared.left):
            with self._lock:
                if self._idle <= 0:
                    return
                self._idle -= 1
            helper = threading.Thread(target=self._help, args=(shared,), daemon=True)
            helpers.append(helper)
            helper.start()

    def _help(self, shared: "_Shared[T]") -> None:
        torch.set_num_threads(1)  # every thread has a number of its own
        try:
            # A core that is lacking is one that another matrix has come for.
            while self._idle >= 0 and (number := shared.take()) is not None:
                shared.do(number)
        finally:
            with self._lock:
                self._idle += 1


class _Shared(Generic[T]):
    """Jobs that several threads take, and their results."""

    def __init__(self, jobs: Sequence[Callable[[], T]]) -> None:
        self._jobs = jobs
        self._results: dict[int, T] = {}
        self._errors: dict[int, BaseException] = {}
        self._next = 0
        self._lock = threading.Lock()

    @property
    def left(self) -> int:
        """How many jobs nobody has taken."""
        return 0 if self._errors else len(self._jobs) - self._next

    def take(self) -> int | None:
        """Return the number of the next job, or None where there is none."""
        with self._lock:
            if not self.left:
                return None
            self._next += 1
            return self._next - 1

    def do(self, number: int) -> None:
        """Do a job."""
        try:
            self._results[number] = self._jobs[number]()
        except BaseException as exc:  # handed to who wanted the results, whatever it is
            self._errors[number] = exc

    def finish(self) -> list[T]:
        """Return the results in the order of the jobs."""
        if self._errors:
            raise self._errors[min(self._errors)]
        return [self._results[number] for number in range(len(self._jobs))]
