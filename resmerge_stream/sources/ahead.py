"""Reading ahead of a merge: what will be read next, in which order, fetched before it is asked for.

Ranges that follow each other are joined to batches, neighbours in a file to one request.
"""

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from .fetch import THREADS, Download, Fetcher, RangedFile, Span

# Ranges are joined until they have this many bytes; a larger one is a batch of its own.
BATCH_BYTES = 32_000_000
# Neighbours that lie no further apart than this are asked for in one request.
_GAP_BYTES = 64_000

_Key = tuple[int, int, int]


@runtime_checkable
class Followed(Protocol):
    """A checkpoint whose reads can be seen coming."""

    ahead: "Ahead | None"

    def spans(self, name: str, start_row: int = 0, stop_row: int | None = None) -> Iterable[Span]:
        """Return where some rows are; nothing when they are on this machine."""
        ...


@contextmanager
def reading_ahead(
    order: Iterable[tuple[Followed, str, int, int] | None],
    sources: Iterable[Followed],
    limit: int,
    connections: int = THREADS,
) -> Iterator[None]:
    """Read ahead for some checkpoints while the context lasts.

    Args:
        order: what will be read: checkpoint, tensor, first row, row after the last. None where
            what comes next is not known yet.
        sources: the checkpoints that are read so; without any, the order is not looked at.
        limit, connections: see `Ahead`.
    """
    followed = list(sources)
    if not followed:
        yield
        return
    ahead = Ahead(_spans(order), limit, connections)
    for source in followed:
        source.ahead = ahead
    try:
        yield
    finally:
        for source in followed:
            source.ahead = None
        ahead.close()


def _spans(order: Iterable[tuple[Followed, str, int, int] | None]) -> Iterator[Span | None]:
    for reading in order:
        if reading is None:
            yield None
            continue
        source, name, start, stop = reading
        yield from source.spans(name, start, stop)


@dataclass(slots=True)
class _Batch:
    """Some ranges under way: where each lies in the download, and how often it is still wanted."""

    download: Download
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
        self, order: Iterable[Span | None], limit: int, connections: int = THREADS
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

    def take(self, span: Span) -> memoryview | None:
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

    def release(self, span: Span) -> None:
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

    def _begin(self, spans: list[Span]) -> _Batch:
        joined: list[Span] = []
        places: dict[_Key, tuple[int, int, int]] = {}
        wanted: dict[_Key, int] = {}
        for span in sorted(spans, key=_key):
            last = joined[-1] if joined else None
            if last is not None and last.file is span.file and span.begin <= last.end + _GAP_BYTES:
                joined[-1] = Span(last.file, last.begin, max(last.end, span.end))
            else:
                joined.append(span)
            start = joined[-1].begin
            places[_key(span)] = (len(joined) - 1, span.begin - start, span.end - start)
            wanted[_key(span)] = wanted.get(_key(span), 0) + 1
        nbytes = sum(span.end - span.begin for span in joined)
        return _Batch(self._fetcher.begin(joined), nbytes, places, wanted)


def _batches(order: Iterable[Span | None]) -> Iterator[list[Span]]:
    """Yield what is fetched at once; an empty batch where nothing more is known for now."""
    batch: list[Span] = []
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


def _key(span: Span) -> _Key:
    file: RangedFile = span.file
    return id(file), span.begin, span.end
