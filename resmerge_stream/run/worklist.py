"""Which shard a process merges next, and which ones it may read ahead."""

import threading
from collections.abc import Callable, Iterator, Sequence

from ..sinks.layout import Shard


class WorkList:
    """The shards of one process, in the order in which it takes them.

    Whoever is free takes the next shard, so that a slow process holds up nobody. What is taken
    ahead of the merge, so that its bytes are on their way, is taken from the others: the more
    shards are left, the more may be taken ahead, and one at the end.

    Args:
        shards: what is left to merge, the same in every process.
        ticket: returns the next number from 0 up, each to one process only.
        processes: how many take from the list.
    """

    def __init__(
        self, shards: Sequence[Shard], ticket: Callable[[], int], processes: int = 1
    ) -> None:
        self._shards, self._ticket, self._processes = shards, ticket, processes
        self._taken: list[Shard] = []
        self._begun = 0
        self._left = len(shards)
        self._lock = threading.Lock()

    def __iter__(self) -> Iterator[Shard]:
        """Yield what this process merges, until nothing is left."""
        while True:
            with self._lock:
                if self._begun == len(self._taken) and not self._take():
                    return
                shard = self._taken[self._begun]
                self._begun += 1
            yield shard

    def ahead(self) -> Iterator[Shard | None]:
        """Yield the same shards before they are merged; None where no more may be taken yet.

        It begins with the one that is being merged.
        """
        with self._lock:
            seen = max(self._begun - 1, 0)
        while True:
            with self._lock:
                if seen == len(self._taken) and self._left and self._may_take():
                    self._take()
                known = self._taken[seen] if seen < len(self._taken) else None
                over = known is None and not self._left
            if over:
                return
            seen += known is not None
            yield known

    def _may_take(self) -> bool:
        if self._processes == 1:
            return True
        waiting = len(self._taken) - self._begun
        return waiting < max(1, self._left // (2 * self._processes))

    def _take(self) -> bool:
        if not self._left:
            return False
        number = self._ticket()
        self._left = max(len(self._shards) - number - 1, 0)
        if number >= len(self._shards):
            return False
        self._taken.append(self._shards[number])
        return True
