"""Small pieces of remote files, read while a model is opened: fetched in blocks, several at once.

A trainer's files say in thousands of places what lies where. One request for each would take
minutes; whoever reads them says which places come next, and neighbours share a request.
"""

from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor

BLOCK_BYTES = 4096
# Blocks that are fetched together; a longer range is a request of its own, and is not kept.
_AT_ONCE = 256
# Blocks no further apart than this are asked for in one request.
_GAP = 8
_KEPT = 2 * _AT_ONCE * _GAP
_THREADS = 8

_Key = tuple[str, int]


class Blocks:
    """The blocks of some files that were read last, at most 16 MB of them.

    Args:
        fetch: returns the bytes [begin, end) of a file.
        sizes: of the files, by name.
    """

    def __init__(
        self, fetch: Callable[[str, int, int], memoryview], sizes: Mapping[str, int]
    ) -> None:
        self._fetch, self._sizes = fetch, sizes
        self._kept: dict[_Key, bytes] = {}
        self._order: list[_Key] = []
        self._place: dict[_Key, int] = {}

    def expect(self, ranges: Iterable[tuple[str, int, int]]) -> None:
        """Take note of what is read next, as file, begin and end, in this order."""
        for file, begin, end in ranges:
            stop = min(end, self._sizes[file])  # more where a file is cut short, as its reader says
            for number in range(begin // BLOCK_BYTES, -(-stop // BLOCK_BYTES)):
                key = file, number
                if key not in self._kept and key not in self._place:
                    self._place[key] = len(self._order)
                    self._order.append(key)

    def read(self, file: str, begin: int, end: int) -> memoryview:
        """Return bytes that are there, or are fetched now with what is read next.

        Raises:
            StoppedError: they cannot be had now.
        """
        numbers = range(begin // BLOCK_BYTES, -(-end // BLOCK_BYTES))
        if len(numbers) > _AT_ONCE:
            return self._fetch(file, begin, end)
        found = {n: self._kept[file, n] for n in numbers if (file, n) in self._kept}
        if len(found) < len(numbers):
            self._load([(file, n) for n in numbers if n not in found])
            found = {n: found[n] if n in found else self._kept[file, n] for n in numbers}
        data = b"".join(found[n] for n in numbers)
        start = numbers.start * BLOCK_BYTES
        return memoryview(data)[begin - start : end - start]

    def _load(self, keys: list[_Key]) -> None:
        """Fetch some blocks, and those that are expected after them."""
        start = min((self._place[key] for key in keys if key in self._place), default=None)
        after = [] if start is None else self._order[start : start + _AT_ONCE]
        wanted = sorted({*keys, *(key for key in after if key not in self._kept)})
        runs: list[tuple[str, int, int]] = []
        for file, number in wanted:
            if runs and runs[-1][0] == file and number <= runs[-1][2] + _GAP:
                runs[-1] = (file, runs[-1][1], number + 1)
            else:
                runs.append((file, number, number + 1))
        with ThreadPoolExecutor(min(_THREADS, len(runs))) as pool:
            for (file, first, last), data in zip(runs, pool.map(self._run, runs), strict=True):
                for number in range(first, last):
                    at = (number - first) * BLOCK_BYTES
                    # The newest last, so that the oldest go first.
                    self._kept.pop((file, number), None)
                    self._kept[file, number] = bytes(data[at : at + BLOCK_BYTES])
        while len(self._kept) > _KEPT:
            del self._kept[next(iter(self._kept))]

    def _run(self, run: tuple[str, int, int]) -> memoryview:
        file, first, last = run
        return self._fetch(file, first * BLOCK_BYTES, min(last * BLOCK_BYTES, self._sizes[file]))
