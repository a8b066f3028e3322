"""Reading ahead of a merge: what will be read next, in which order, fetched before it is asked for.

Ranges that follow each other are joined to batches, neighbours in a file to one request. Batches
come in the order in which they are begun, in parallel parts, bounded in bytes.
"""

import mmap
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

# A part is what one request asks for: small enough to share the line, large beside a round trip.
PART_BYTES = 8_000_000
THREADS = 8
# Ranges are joined until they have this many bytes; a larger one is a batch of its own.
BATCH_BYTES = 32_000_000
# Neighbours that lie no further apart than this are asked for in one request.
_GAP_BYTES = 64_000

_Key = tuple[int, int, int]


class RangedFile(Protocol):
    """A file that fills buffers from a position on."""

    def read_into(self, begin: int, view: memoryview) -> None:
        """Fill the buffer with the bytes from `begin` on."""
        ...


@dataclass(frozen=True, slots=True)
class ByteRange:
    """Bytes [begin, end) of a file."""

    file: RangedFile
    begin: int
    end: int


class Transfer:
    """Some spans on their way; made by `Fetcher.begin`."""

    def __init__(self, fetcher: "Fetcher", spans: Sequence[ByteRange]) -> None:
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
    download: Transfer
    span: ByteRange
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
        self.urgent: set[Transfer] = set()  # waited for, with parts that nobody fetches yet
        self.is_closed = False
        self.changed = threading.Condition()
        self._parts: deque[_Part] = deque()
        self._threads = [threading.Thread(target=self._run, daemon=True) for _ in range(threads)]
        self._started = False

    def begin(self, spans: Sequence[ByteRange]) -> Transfer:
        """Queue some spans and return at once."""
        download = Transfer(self, spans)
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


@dataclass(slots=True)
class _Batch:
    """Some ranges under way: where each lies in the download, and how often it is still wanted."""

    download: Transfer
    nbytes: int
    places: dict[_Key, tuple[int, int, int]]
    wanted: dict[_Key, int] = field(default_factory=dict)


class Ahead:
    """Fetches the ranges of a merge before they are read.

    Args:
        order: the ranges in the order in which they will be read; taken lazily. None where what
            comes next is not known yet: it is asked for again later.
        limit: bytes that may be on their way or held. A range that someone waits for is always
            fetched, so that a small limit is slow and never stuck.
        connections: requests at a time.
    """

    def __init__(
        self, order: Iterable[ByteRange | None], limit: int, connections: int = THREADS
    ) -> None:
        self._order = _batches(order)
        self._limit = limit
        self._fetcher = Fetcher(limit, connections)
        self._lock = threading.RLock()
        self._where: dict[_Key, list[_Batch]] = {}
        self._begun_bytes = 0
        self._begun = 0
        self._more = True
        with self._lock:
            self._begin_more()

    @property
    def received(self) -> int:
        """Bytes that came so far."""
        return self._fetcher.received

    def take(self, span: ByteRange) -> memoryview | None:
        """Return the bytes of a range once they are there; None if it was not in the order.

        Raises:
            ResMergeError: they cannot be had.
        """
        key = _key(span)
        with self._lock:
            self._begin_more()
            found = self._where.get(key)
            if not found:
                return None
            batch = found[0]
        number, begin, end = batch.places[key]
        return batch.download.wait()[number][begin:end]

    def release(self, span: ByteRange) -> None:
        """Say that a range was read and its bytes may go."""
        key = _key(span)
        with self._lock:
            found = self._where.get(key)
            if not found:
                return
            batch = found[0]
            batch.wanted[key] -= 1
            if batch.wanted[key] == 0:
                found.pop(0)
                if not found:
                    del self._where[key]
            if not any(batch.wanted.values()):
                self._begun_bytes -= batch.nbytes
                self._begun -= 1
                batch.download.release()
                self._begin_more()

    def close(self) -> None:
        """Stop fetching."""
        self._fetcher.close()

    def _begin_more(self) -> None:
        """Queue batches until there is enough to keep the line busy, and always the next few."""
        while self._more and (self._begun_bytes < 2 * self._limit or self._begun < 4):
            try:
                spans = next(self._order)
            except StopIteration:
                self._more = False
                return
            if not spans:
                return
            batch = self._begin(spans)
            self._begun += 1
            self._begun_bytes += batch.nbytes
            for key in batch.wanted:
                self._where.setdefault(key, []).append(batch)

    def _begin(self, spans: list[ByteRange]) -> _Batch:
        joined: list[ByteRange] = []
        places: dict[_Key, tuple[int, int, int]] = {}
        wanted: dict[_Key, int] = {}
        for span in sorted(spans, key=_key):
            last = joined[-1] if joined else None
            if last is not None and last.file is span.file and span.begin <= last.end + _GAP_BYTES:
                joined[-1] = ByteRange(last.file, last.begin, max(last.end, span.end))
            else:
                joined.append(span)
            start = joined[-1].begin
            places[_key(span)] = (len(joined) - 1, span.begin - start, span.end - start)
            wanted[_key(span)] = wanted.get(_key(span), 0) + 1
        nbytes = sum(span.end - span.begin for span in joined)
        return _Batch(self._fetcher.begin(joined), nbytes, places, wanted)


def _batches(order: Iterable[ByteRange | None]) -> Iterator[list[ByteRange]]:
    """Yield what is fetched at once; an empty batch where nothing more is known for now."""
    batch: list[ByteRange] = []
    size = 0
    for span in order:
        if span is None:
            if batch:
                yield batch
            batch, size = [], 0
            yield []
            continue
        if span.begin == span.end:
            continue
        if batch and size + span.end - span.begin > BATCH_BYTES:
            yield batch
            batch, size = [], 0
        batch.append(span)
        size += span.end - span.begin
    if batch:
        yield batch


def _key(span: ByteRange) -> _Key:
    file: RangedFile = span.file
    return id(file), span.begin, span.end
