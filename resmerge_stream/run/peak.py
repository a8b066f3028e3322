"""The largest private memory of a process while it is watched."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from ..device import private_memory

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
