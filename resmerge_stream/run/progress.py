"""How far a run is, how fast, how long it will take, and the most private memory that it had."""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from ..device import private_memory
from ..hub.patience import PATIENCE

# Speeds are taken over about this time: long enough to be steady, short enough to be of now.
_SPEED_S = 10.0
# How often a process's memory is looked at.
_LOOK_S = 0.02


@dataclass(slots=True)
class Peak:
    """What a run's report says of memory.

    Attributes:
        bytes: anonymous and shared memory, no mapped files; at most so much so far.
    """

    bytes: int = 0

    def look(self) -> None:
        """Look at the memory now."""
        self.bytes = max(self.bytes, private_memory())

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Look at it all the while: a tensor's peak lies between the events."""
        over = threading.Event()

        def watch() -> None:
            while not over.wait(_LOOK_S):
                self.look()

        thread = threading.Thread(target=watch, name="memory", daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()


@dataclass(slots=True)
class Progress:
    """Counts of one run.

    Attributes:
        bytes_sent: returns the bytes that this run has sent to the Hub.
        merge_bytes, send_bytes: all that this run has to merge, and to send.
        bytes_read, bytes_written: of this process so far.
        peak: private memory of a process, at most.
        others: bytes read, written and sent by each other process.
    """

    bytes_sent: Callable[[], int]
    merge_bytes: int = 0
    send_bytes: int = 0
    bytes_read: int = 0
    bytes_written: int = 0
    peak: Peak = field(default_factory=Peak)
    others: dict[int, tuple[int, int, int]] = field(default_factory=dict)
    _started: float = field(default_factory=time.monotonic)
    _merging_since: float | None = None
    _sending_since: float | None = None
    _sent: int = 0
    _sent_at: float = 0.0
    _samples: deque[tuple[float, int, int, int]] = field(default_factory=deque)

    @property
    def seconds(self) -> float:
        """Since the run started."""
        return time.monotonic() - self._started

    def start_merging(self) -> None:
        """Say that what came before, such as counting passes, tells nothing about the rest."""
        self._merging_since = time.monotonic()

    def start_sending(self) -> None:
        """Say that a shard is finished; the first one is the first that can be sent."""
        if self._sending_since is None:
            self._sending_since = time.monotonic()

    def totals(self) -> tuple[int, int, int]:
        """Return the bytes read, written and sent by all processes."""
        own = (self.bytes_read, self.bytes_written, self.bytes_sent())
        read, written, sent = (
            sum(column) for column in zip(own, *self.others.values(), strict=True)
        )
        return read, written, sent

    def now(self) -> Mapping[str, Any]:
        """Return the fields of `Progressed`."""
        moment, counts = time.monotonic(), self.totals()
        samples = self._samples
        samples.append((moment, *counts))
        while len(samples) > 2 and samples[1][0] <= moment - _SPEED_S:
            samples.popleft()
        then, *before = samples[0]
        passed = max(moment - then, 1e-9)
        speeds = [(c - b) / passed for c, b in zip(counts, before, strict=True)]
        return {
            **dict(zip(("bytes_read", "bytes_written", "bytes_sent"), counts, strict=True)),
            **dict(zip(("read_speed", "write_speed", "sent_speed"), speeds, strict=True)),
            "seconds": moment - self._started,
            "seconds_left": self._seconds_left(moment, *counts[1:]),
            "waiting": PATIENCE.waiting(),
        }

    def _seconds_left(self, moment: float, written: int, sent: int) -> float | None:
        """Merging and sending go on at the same time: the slower one decides.

        Sending begins with the first finished shard, and may be told of in whole shards: its speed
        is that of the bytes known to be sent, when they were.
        """
        since = self._merging_since if self._merging_since is not None else self._started
        left = []
        if written:
            left.append((moment - since) * max(self.merge_bytes - written, 0) / written)
        if sent != self._sent:
            self._sent, self._sent_at = sent, moment
        if self._sent and self._sending_since is not None:
            speed = self._sent / max(self._sent_at - self._sending_since, 1e-9)
            due = self._sent_at + max(self.send_bytes - self._sent, 0) / speed
            left.append(max(due - moment, 0.0))
        return max(left, default=None)
