"""Two threads around the arithmetic: read ahead and write behind, each bounded in bytes."""

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Generic, TypeVar

T = TypeVar("T")


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


class ReadAhead(Generic[T]):
    """Runs loads in a thread, in order, ahead of their consumer.

    Args:
        jobs: pairs of bytes and a function that loads them; made lazily, called in the thread.
        limit: bytes that may be loaded and not yet released.

    An item's bytes are released when the next one is asked for. Errors of a load are raised where
    its item would have come.
    """

    def __init__(self, jobs: Iterable[tuple[int, Callable[[], T]]], limit: int) -> None:
        self._window = _Window(limit)
        self._ready: deque[tuple[int, T]] = deque()
        self._done = False
        self._thread = threading.Thread(target=self._run, args=(iter(jobs),), daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[T]:
        window, held = self._window, 0
        while True:
            with window.changed:
                window.used -= held
                window.changed.notify_all()
                window.changed.wait_for(lambda: self._ready or self._done)
                if not self._ready:
                    if window.error is not None:
                        raise window.error
                    return
                held, item = self._ready.popleft()
            yield item
            del item

    def close(self) -> None:
        """Stop loading, and wait for the load that is under way."""
        with self._window.changed:
            self._window.closed = True
            self._window.changed.notify_all()
        self._thread.join()
        self._ready.clear()

    def _run(self, jobs: Iterator[tuple[int, Callable[[], T]]]) -> None:
        window = self._window
        try:
            for size, load in jobs:
                with window.changed:
                    window.changed.wait_for(lambda size=size: window.has_room(size))  # type: ignore[misc]
                    if window.closed:
                        return
                    window.used += size
                item = load()
                with window.changed:
                    self._ready.append((size, item))
                    window.changed.notify_all()
        except BaseException as exc:  # handed to the consumer, whatever it is
            window.error = exc
        finally:
            with window.changed:
                self._done = True
                window.changed.notify_all()


class WriteBehind:
    """Runs writes in a thread, in order, behind their producer.

    Args:
        limit: bytes that may wait.
    """

    def __init__(self, limit: int) -> None:
        self._window = _Window(limit)
        self._waiting: deque[tuple[int, Callable[[], object]]] = deque()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

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

    def drain(self) -> None:
        """Wait until everything queued is written.

        Raises:
            BaseException: whatever a write raised.
        """
        with self._window.changed:
            self._window.changed.wait_for(lambda: self._window.used == 0 or self._window.error)
            self._raise()

    def close(self) -> None:
        """Drop what still waits, and wait for the write that is under way."""
        with self._window.changed:
            self._window.closed = True
            self._waiting.clear()
            self._window.changed.notify_all()
        self._thread.join()

    def _raise(self) -> None:
        if self._window.error is not None:
            raise self._window.error

    def _run(self) -> None:
        window = self._window
        while True:
            with window.changed:
                window.changed.wait_for(lambda: self._waiting or window.closed)
                if window.closed:
                    return
                size, write = self._waiting.popleft()
            try:
                write()
            except BaseException as exc:  # handed to the producer, whatever it is
                with window.changed:
                    window.error = exc
                    window.changed.notify_all()
                return
            del write
            with window.changed:
                window.used -= size
                window.changed.notify_all()
