"""The K-th largest of a stream of magnitudes, exactly, in one pass. Not a method itself.

Ours. A bracket around the K-th largest of what came so far follows it: what lies above is counted,
what lies inside is kept, what lies below is forgotten. The bracket narrows as more is known. Where
the stream drifts so far that its K-th largest slips out of the bracket, `result` says so.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from ...maths.lazy import kernels, np

if TYPE_CHECKING:
    from numpy.typing import NDArray

# Half the bracket's width, as a share of what came: of the noise of b blocks that differ among
# themselves, σ = _DRIFT / (3 √b), and of that of s entries, σ = 0.5 / √s.
_DRIFT = 0.08
_NOISE = 2.0
# The first blocks are kept whole: one alone says little about the others.
_FIRST = 4
# Entries that may wait to be sorted into the bracket.
_WAITING = 1 << 18
# What is looked at at once has to fit.
_LEAST = 4096
# The pattern of the largest float32.
_INFINITY = 0x7F800000


class RunningRank:
    """Finds one magnitude in a stream of blocks that come in no particular order.

    Args:
        rank: K, counted from the largest, 1 to `total`.
        total: numbers that will come.

    Memory: the first four blocks; later up to 12 MB that wait or are being sorted, and up to 12
    bytes for each different magnitude of the 0.16 / √blocks of the stream around the K-th largest.
    """

    def __init__(self, rank: int, total: int) -> None:
        self._rank, self._total = rank, total
        self._low, self._high = 0, _INFINITY  # the bracket, both ends inside
        self._above = self._seen = self._blocks = 0
        self._values: NDArray[np.uint32] = np.empty(0, np.uint32)  # inside, from the largest
        self._counts: NDArray[np.int64] = np.empty(0, np.int64)
        # Taken at once: arrays of many sizes that last would break a heap into pieces.
        self._waiting: NDArray[np.uint32] = np.empty(max(min(_WAITING, total), _LEAST), np.uint32)
        self._wait_count = 0

    def add(self, values: NDArray[np.float32]) -> None:
        """Take the next numbers, of which the magnitudes count; one axis."""
        done = 0
        while done < values.size:
            room = self._waiting[self._wait_count :]
            low, high = _number(self._low), _number(self._high)
            seen, above, inside = kernels.bracketed(values[done:], low, high, room)
            done += seen
            self._above += above
            self._wait_count += inside
            if done < values.size:
                self._sort_in()
        self._seen += values.size
        self._blocks += 1
        is_power_of_two = self._blocks & (self._blocks - 1) == 0
        if is_power_of_two and self._blocks >= _FIRST:
            self._sort_in()
            self._narrow()

    def result(self) -> int | None:
        """Return the pattern of the K-th largest, or None where it slipped out of the bracket."""
        self._sort_in()
        ranks = self._ranks()
        if not self._above < self._rank <= (int(ranks[-1]) if ranks.size else 0):
            return None
        return int(self._values[ranks.searchsorted(self._rank)])

    def _sort_in(self) -> None:
        waiting = self._waiting[: self._wait_count]
        values, counts = np.unique(waiting, return_counts=True)
        self._wait_count = 0
        together = np.union1d(values, self._values)
        number = np.zeros(together.size, np.int64)
        number[together.searchsorted(values)] += counts
        number[together.searchsorted(self._values)] += self._counts
        self._values, self._counts = together[::-1], number[::-1]

    def _ranks(self) -> NDArray[Any]:
        """Return the rank of the last entry of each value inside, among all that came."""
        ranks: NDArray[Any] = self._above + self._counts.cumsum()
        return ranks

    def _narrow(self) -> None:
        """Draw the bracket closer around where the K-th largest is to be expected."""
        ranks = self._ranks()
        expected = self._rank * self._seen / self._total
        margin = self._seen * _DRIFT / math.sqrt(self._blocks) + _NOISE * math.sqrt(self._seen)
        last = ranks.size - 1
        first = min(int(ranks.searchsorted(expected - margin)), last)
        stop = min(int(ranks.searchsorted(expected + margin)), last)
        if stop < last:
            self._low = int(self._values[stop])
        if first > 0:
            self._high = int(self._values[first])
            self._above = int(ranks[first - 1])
        self._values = self._values[first : stop + 1].copy()
        self._counts = self._counts[first : stop + 1].copy()


def _number(pattern: int) -> np.float32:
    """Return the float32 number with a bit pattern: they are ordered alike from 0 on."""
    return np.uint32(pattern).view(np.float32)
