"""Threads around a loop: work ahead of it and writes behind it, each bounded in bytes."""

import itertools
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Generic, TypeVar

T = TypeVar("T")
E = TypeVar("E")
# Soon enough for whoever pressed Ctrl-C, and seldom enough to cost nothing.
_HEARD_WITHIN_S = 0.2


class _Window:
    """A condition with a count of the bytes that are in flight."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.used = 0
        self.closed = False
        self.error: BaseException | None = None
        self.changed = threading.Condition()

    def has_room(self, size: int) -> bool:
        """Whether `size` more bytes fit; a single item larger than the window passes alone."""
        return self.closed or self.used == 0 or self.used + size <= self.limit


class Held(Generic[T]):
    """A result whose bytes count until it is freed.

    Attributes:
        value: the result.
    """

    def __init__(self, value: T, size: int, window: _Window) -> None:
        self.value = value
        self._size, self._window = size, window

    def free(self, *, down_to: int = 0) -> None:
        """Give bytes back to the window, all or down to some; a second call does nothing."""
        size = max(self._size - down_to, 0)
        self._size -= size
        with self._window.changed:
            self._window.used -= size
            self._window.changed.notify_all()


class WorkAhead(Generic[T]):
    """Runs jobs in threads ahead of their consumer, and hands the results over in order.

    Args:
        jobs: pairs of bytes and a function; taken in order, lazily, by the threads.
        limit: bytes of jobs that may be started and not yet freed. A job larger than that
            runs alone.
        workers: threads.
        keeps: bytes that a result holds once its job is done; all that were counted when None.

    An error of a job is raised where its result would have come.
    """

    def __init__(
        self,
        jobs: Iterable[tuple[int, Callable[[], T]]],
        limit: int,
        *,
        workers: int = 1,
        keeps: Callable[[T], int] | None = None,
    ) -> None:
        self._keeps = keeps
        self._jobs = iter(jobs)
        self._window = _Window(limit)
        self._taking = threading.Lock()
        self._taken = 0
        self._exhausted = False
        self._results: dict[int, Held[T] | BaseException] = {}
        self._threads = [threading.Thread(target=self._run, daemon=True) for _ in range(workers)]
        for thread in self._threads:
            thread.start()

    def __iter__(self) -> Iterator[Held[T]]:
        return (result for result in self.within(None) if result is not None)

    def within(self, seconds: float | None) -> Iterator[Held[T] | None]:
        """Yield the results in order, and None whenever the next one took longer than that."""
        for number in itertools.count():
            while True:
                with self._window.changed:
                    ready = self._window.changed.wait_for(
                        lambda number=number: number in self._results or self._no_more(number),  # type: ignore[misc]
                        seconds,
                    )
                    result = self._results.pop(number, None)
                if ready:
                    break
                yield None
            if result is None:
                return
            if isinstance(result, BaseException):
                raise result
            yield result
            del result

    def close(self) -> None:
        """Start no more jobs, and wait for those under way."""
        with self._window.changed:
            self._window.closed = True
            self._window.changed.notify_all()
        for thread in self._threads:
            thread.join()
        self._results.clear()

    def _no_more(self, number: int) -> bool:
        return self._window.closed or (self._exhausted and number >= self._taken)

    def _run(self) -> None:
        while True:
            taken = self._take()
            if taken is None:
                return
            number, size, job = taken
            result: Held[T] | BaseException
            try:
                result = Held(job(), size, self._window)
                if self._keeps is not None:
                    result.free(down_to=self._keeps(result.value))
            except BaseException as exc:  # handed to the consumer, whatever it is
                result = exc
            del job, taken
            with self._window.changed:
                self._results[number] = result
                self._exhausted |= isinstance(result, BaseException)
                self._window.changed.notify_all()
            del result

    def _take(self) -> tuple[int, int, Callable[[], T]] | None:
        """Return the next job once its bytes fit; jobs start in their order."""
        window = self._window
        with self._taking:
            if self._exhausted or window.closed:
                return None
            try:
                size, job = next(self._jobs)
            except BaseException as exc:  # the end, or an error of the source of jobs
                with window.changed:
                    self._exhausted = True
                    if not isinstance(exc, StopIteration):
                        self._results[self._taken] = exc
                        self._taken += 1
                    window.changed.notify_all()
                return None
            with window.changed:
                window.changed.wait_for(lambda: window.has_room(size))
                if window.closed:
                    return None
                window.used += size
                self._taken += 1
                return self._taken - 1, size, job


class WriteBehind:
    """Runs writes in threads, begun in order, behind their producer.

    Args:
        limit: bytes that may wait; None for any number.
        threads: writes at a time.
    """

    def __init__(self, limit: int | None, threads: int = 1) -> None:
        self._window = _Window(1 << 62 if limit is None else limit)
        self._waiting: deque[tuple[int, Callable[[], object]]] = deque()
        self._threads = [threading.Thread(target=self._run, daemon=True) for _ in range(threads)]
        for thread in self._threads:
            thread.start()

    def put(self, size: int, write: Callable[[], object]) -> None:
        """Queue a write of `size` bytes; blocks while the window is full.

        Raises:
            BaseException: whatever an earlier write raised.
        """
        window = self._window
        with window.changed:
            window.changed.wait_for(lambda: window.has_room(size) or window.error)
            self._raise()
            window.used += size
            self._waiting.append((size, write))
            window.changed.notify_all()

    def drain(self, *, down_to: int = 0) -> None:
        """Wait until everything queued is written, or all but some bytes, or it was closed.

        Raises:
            BaseException: whatever a write raised.
        """
        window, most = self._window, max(down_to, 0)
        with window.changed:
            window.changed.wait_for(lambda: window.used <= most or window.error or window.closed)
            self._raise()

    def close(self, *, wait: bool = True) -> None:
        """Drop what still waits; writes that are under way are waited for, or end by themselves."""
        with self._window.changed:
            self._window.closed = True
            self._waiting.clear()
            self._window.changed.notify_all()
        for thread in self._threads if wait else ():
            thread.join()

    def _raise(self) -> None:
        if self._window.error is not None:
            raise self._window.error

    def _run(self) -> None:
        window = self._window
        while True:
            with window.changed:
                window.changed.wait_for(lambda: self._waiting or window.closed or window.error)
                if window.closed or window.error:
                    return
                size, write = self._waiting.popleft()
            try:
                write()
            except BaseException as exc:  # handed to the producer, whatever it is
                with window.changed:
                    window.error = window.error or exc
                    window.changed.notify_all()
                return
            del write
            with window.changed:
                window.used -= size
                window.changed.notify_all()


def meanwhile(call: Callable[[], object], seconds: float, tick: Callable[[], E]) -> Iterator[E]:
    """Run a call in a thread, and yield a tick every so many seconds until it is done.

    Args:
        call: may be left running when the iterator is closed, so it must end when what it waits
            for is closed.
        seconds: between two ticks.
        tick: makes what is yielded.

    Raises:
        BaseException: whatever the call raised.
    """
    done = threading.Event()
    errors: list[BaseException] = []

    def run() -> None:
        try:
            call()
        except BaseException as exc:  # handed to the caller, whatever it is
            errors.append(exc)
        finally:
            done.set()

    threading.Thread(target=run, daemon=True).start()
    while not done.wait(seconds):
        yield tick()
    if errors:
        raise errors[0]


def heard(items: Iterable[T]) -> Iterator[T]:
    """Yield items that a thread reads, so that Ctrl-C is heard at once, whatever it waits for.

    Python looks at signals between two of its instructions. One that comes right before a wait
    within a library, or to another thread, is heard when that wait is over: minutes, for a log
    in which nothing happens.

    Args:
        items: may be left waiting when the iterator is closed.

    Raises:
        BaseException: whatever reading the items raised.
    """
    came: queue.SimpleQueue[tuple[T] | BaseException | None] = queue.SimpleQueue()

    def read() -> None:
        try:
            for item in items:
                came.put((item,))
            came.put(None)
        except BaseException as exc:  # handed to the caller, whatever it is
            came.put(exc)

    threading.Thread(target=read, daemon=True).start()
    while True:
        try:
            found = came.get(timeout=_HEARD_WITHIN_S)
        except queue.Empty:
            continue
        if found is None:
            return
        if isinstance(found, BaseException):
            raise found
        yield found[0]
