"""How long failures of the Hub are ridden out, and what is waited for meanwhile.

A process has one line to the Hub, and one patience: `PATIENCE`, as the client has one session.
"""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from ..units import format_duration

# Planning costs seconds, so it gives up soon; a merge may have run for hours.
PLANNING_S = 30.0
MERGING_S = 900.0
# Tried so often whatever the patience: a single fault is no outage.
_LEAST_TRIES = 3
# A wait shorter than this is nobody's business; a long one is told of once a minute.
_QUIET_S = 2.0
_TELL_EACH_S = 60.0


@dataclass(frozen=True, slots=True)
class Waiting:
    """What is waited for.

    Attributes:
        why: what failed, in words.
        until: when it is tried again, in seconds of `time.monotonic`.
        gives_up: when it is tried for the last time, likewise; None: the Hub named the moment.
    """

    why: str
    until: float
    gives_up: float | None = None

    def words(self) -> str:
        """Return why and until when, as of now."""
        now = time.monotonic()
        text = f"waiting: {self.why}; next try in {max(self.until - now, 0):.0f} s"
        if self.gives_up is None:
            return text
        left = max(self.gives_up - now, 0)
        return f"{text}, giving up in {format_duration(left)}"


class Patience:
    """How long a failing call is repeated.

    Args:
        seconds: from the first failure in a row to giving up.
    """

    def __init__(self, seconds: float = PLANNING_S) -> None:
        self.seconds = seconds
        self.tell: Callable[[str], None] | None = None
        self._waits: dict[int, Waiting] = {}
        self._by_client: Waiting | None = None
        self._told_at = float("-inf")
        self._lock = threading.Lock()

    @contextmanager
    def of(self, seconds: float) -> Iterator[None]:
        """Have another patience while the context lasts."""
        before, self.seconds = self.seconds, seconds
        try:
            yield
        finally:
            self.seconds = before

    def waiting(self) -> str | None:
        """Return what is waited for now, the longest of it, or None."""
        with self._lock:
            waits = list(self._waits.values())
            if self._by_client is not None and self._by_client.until > time.monotonic():
                waits.append(self._by_client)
        longest = max(waits, key=lambda wait: wait.until, default=None)
        return longest.words() if longest is not None else None

    def wait(self, seconds: float, why: str, gives_up: float | None = None) -> None:
        """Sleep, and let it be known why."""
        if seconds <= 0:
            return
        waiting = Waiting(why, time.monotonic() + seconds, gives_up)
        if seconds >= _QUIET_S:
            self._say(waiting)
        with self.noted(waiting):
            time.sleep(seconds)

    @contextmanager
    def noted(self, waiting: Waiting) -> Iterator[None]:
        """Let `waiting` name this while the context lasts."""
        with self._lock:
            self._waits[id(waiting)] = waiting
        try:
            yield
        finally:
            with self._lock:
                del self._waits[id(waiting)]

    def client_waits(self, seconds: float, why: str) -> None:
        """Take note that the Hub's client sleeps by itself."""
        waiting = Waiting(why, time.monotonic() + seconds)
        if seconds >= _QUIET_S:
            self._say(waiting)
        with self._lock:
            self._by_client = waiting

    def _say(self, waiting: Waiting) -> None:
        with self._lock:
            now = time.monotonic()
            due = now - self._told_at >= _TELL_EACH_S
            self._told_at = now if due else self._told_at
        if due and self.tell is not None:
            self.tell(waiting.words())


PATIENCE = Patience()


class Tries:
    """The failures in a row of one thing that is tried again and again.

    Args:
        patience: says for how long.
    """

    def __init__(self, patience: Patience = PATIENCE) -> None:
        self._patience = patience
        self._since: float | None = None
        self.failures = 0

    def went_on(self) -> None:
        """Forget the failures: something came."""
        self._since, self.failures = None, 0

    def failed(self, at_most: int | None = None, wait: float = 0.0) -> bool:
        """Count a failure; return whether there is another try.

        Args:
            at_most: tries of what time does not mend.
            wait: seconds before it, which the Hub may have named: longer than the patience is none.
        """
        now = time.monotonic()
        self._since = now if self._since is None else self._since
        self.failures += 1
        if (at_most is not None and self.failures >= at_most) or wait > self._patience.seconds:
            return False
        return self.failures < _LEAST_TRIES or now - self._since < self._patience.seconds

    def wait(self, seconds: float, why: str) -> None:
        """Wait before the next try."""
        since = self._since if self._since is not None else time.monotonic()
        self._patience.wait(seconds, why, since + self._patience.seconds)
