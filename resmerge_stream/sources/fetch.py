"""Downloads in the order they are asked for, in parallel parts, bounded in bytes."""

import mmap
import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

# A part is what one request asks for: small enough to share the line, large beside a round trip.
PART_BYTES = 8_000_000
THREADS = 8


class RangedFile(Protocol):
    """A file that fills buffers from a position on."""

    def read_into(self, begin: int, view: memoryview) -> None:
        """Fill the buffer with the bytes from `begin` on."""
        ...


@dataclass(frozen=True, slots=True)
class Span:
    """Bytes [begin, end) of a file."""

    file: RangedFile
    begin: int
    end: int


class Download:
    """Some spans on their way; made by `Fetcher.begin`."""

    def __init__(self, fetcher: "Fetcher", spans: Sequence[Span]) -> None:
        self._fetcher = fetcher
        # Mapped, not allocated: pages take memory when their bytes arrive, and go back at once.
        self._buffers = [memoryview(mmap.mmap(-1, max(s.end - s.begin, 1))) for s in spans]
        self.sizes = [span.end - span.begin for span in spans]
        self.missing = 0
        self.admitted = 0
        self.error: BaseException | None = None
        self.queued = 0

    def wait(self) -> list[memoryview]:
        """Return the spans' bytes once all are there.

        Raises:
            ResMergeError: a part cannot be had.
        """
        changed = self._fetcher.changed
        with changed:
            if self.queued:
                self._fetcher.urgent.add(self)
                changed.notify_all()
            changed.wait_for(lambda: self.missing == 0 or self.error or self._fetcher.is_closed)
            if self.error is not None:
                raise self.error
            if self.missing:
                raise RuntimeError("the read-ahead was closed while someone waited for it")
        return [view[:size] for view, size in zip(self._buffers, self.sizes, strict=True)]

    def release(self) -> None:
        """Give the bytes back; the views must not be used any more."""
        self._buffers = []
        with self._fetcher.changed:
            self._fetcher.used -= self.admitted
            self.admitted = 0
            self._fetcher.changed.notify_all()

    def part(self, number: int, begin: int, end: int) -> memoryview:
        """Return the place of some bytes of one span."""
        return self._buffers[number][begin:end]


@dataclass(slots=True)
class _Part:
    download: Download
    span: Span
    view: memoryview
    begin: int


class Fetcher:
    """Threads that fetch spans' parts, first asked first served.

    Args:
        limit: bytes that may be on their way or not yet released. What someone waits for is
            fetched whatever the limit.
        threads: requests at a time.
    """

    def __init__(self, limit: int, threads: int = THREADS) -> None:
        self.limit = limit
        self.used = 0
        self.received = 0
        self.urgent: set[Download] = set()  # waited for, with parts that nobody fetches yet
        self.is_closed = False
        self.changed = threading.Condition()
        self._parts: deque[_Part] = deque()
        self._threads = [threading.Thread(target=self._run, daemon=True) for _ in range(threads)]
        self._started = False

    def begin(self, spans: Sequence[Span]) -> Download:
        """Queue some spans and return at once."""
        download = Download(self, spans)
        parts = []
        for number, span in enumerate(spans):
            for begin in range(span.begin, span.end, PART_BYTES):
                end = min(begin + PART_BYTES, span.end)
                view = download.part(number, begin - span.begin, end - span.begin)
                parts.append(_Part(download, span, view, begin))
        download.missing = download.queued = len(parts)
        with self.changed:
            if not self._started:
                self._started = True
                for thread in self._threads:
                    thread.start()
            self._parts.extend(parts)
            self.changed.notify_all()
        return download

    def close(self) -> None:
        """Drop what still waits; requests under way end by themselves."""
        with self.changed:
            self.is_closed = True
            self._parts.clear()
            self.changed.notify_all()

    def _run(self) -> None:
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.is_closed or self._may_start())
                if self.is_closed:
                    return
                part = self._parts.popleft()
                part.download.queued -= 1
                if part.download.queued == 0:
                    self.urgent.discard(part.download)
                self.used += len(part.view)
                part.download.admitted += len(part.view)
            error: BaseException | None = None
            try:
                part.span.file.read_into(part.begin, part.view)
            except BaseException as exc:  # handed to whoever waits, whatever it is
                error = exc
            with self.changed:
                self.received += len(part.view)
                part.download.missing -= 1
                part.download.error = part.download.error or error
                self.changed.notify_all()
            del part

    def _may_start(self) -> bool:
        if not self._parts:
            return False
        fits = self.used == 0 or self.used + len(self._parts[0].view) <= self.limit
        return fits or bool(self.urgent)
