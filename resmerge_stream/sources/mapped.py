"""Rows of tables in another order: a vocabulary matched by token, read row block by row block."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING

from ..maths.lazy import np, torch
from ..specs import DTYPES
from .assembly import Box, Node, Reading, Source, storage_type, whole

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from .assembly import Array

# What stands in `which` for rows that are no table's.
ZERO, MEAN_OF_SOME, MEAN_OF_ALL = -1, -2, -3
_BLOCK_ROWS = 4096


class Mapped(Node):
    """A table whose rows come from the same table of several models.

    Args:
        own: the model's own table; its further axes are those of the result.
        tables: what rows are taken from.
        which: of every row which table, or `ZERO`, `MEAN_OF_SOME` (see `means`), `MEAN_OF_ALL`
            (of all rows before the first such row).
        row: of every row its number in that table.
        means: of a row its parts, as pairs of table and row.
        dtype: of the result; other dtypes are rounded to it.
    """

    def __init__(
        self,
        own: Source,
        tables: Sequence[Source],
        which: NDArray[np.int64],
        row: NDArray[np.int64],
        means: Mapping[int, Sequence[tuple[int, int]]],
        dtype: str,
    ) -> None:
        self.own, self.tables, self.means = own, tuple(tables), means
        self.which, self.row = which, row
        self.shape, self.dtype = (len(which), *own.shape[1:]), dtype

    def readings(self, box: Box) -> Iterator[Reading]:
        """Yield the rows that are taken, run by run."""
        for begin, end in self.runs(*box[0]):
            table = int(self.which[begin])
            if table >= 0:
                first = int(self.row[begin])
                inner = ((first, first + end - begin), *box[1:])
                yield from self.tables[table].readings(inner)
            elif table == MEAN_OF_SOME:
                for part, number in self.means[begin]:
                    yield from self.tables[part].readings(((number, number + 1), *box[1:]))
            elif table == MEAN_OF_ALL:
                yield from self.readings(((0, self._known), *box[1:]))

    def fill(self, box: Box, out: Array) -> None:
        """Write the rows, run by run."""
        start = box[0][0]
        for begin, end in self.runs(*box[0]):
            table, place = int(self.which[begin]), out[begin - start : end - start]
            if table >= 0:
                first = int(self.row[begin])
                inner = ((first, first + end - begin), *box[1:])
                source = self.tables[table]
                if source.dtype == self.dtype:
                    source.fill(inner, place)
                else:
                    place[...] = _stored(_values(source, inner), self.dtype)
            elif table == ZERO:
                place[...] = 0
            elif table == MEAN_OF_SOME:
                mean = np.mean(
                    [
                        _values(self.tables[part], ((number, number + 1), *box[1:]))
                        for part, number in self.means[begin]
                    ],
                    axis=0,
                )
                place[...] = _stored(mean, self.dtype)
            else:
                inner_axes = tuple(slice(*span) for span in box[1:])
                place[...] = _stored(self._mean[inner_axes][None], self.dtype)

    def runs(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """Yield (first, last + 1) of rows that are read at once: neighbours of one table."""
        which, row = self.which[start:stop], self.row[start:stop]
        breaks = np.flatnonzero((np.diff(which) != 0) | (np.diff(row) != 1) | (which[1:] < 0)) + 1
        edges = [start, *(start + breaks).tolist(), stop]
        yield from ((a, b) for a, b in pairwise(edges) if a < b)

    @property
    def is_own(self) -> bool:
        """Whether the rows are the own table's, each at its place."""
        table = self.tables.index(self.own)  # an adapter's is its base's once more
        are_own = bool((self.which == table).all() and (self.row == np.arange(len(self.row))).all())
        return are_own and self.shape == self.own.shape

    @property
    def _known(self) -> int:
        """How many rows stand before those that are the mean of all."""
        return int((self.which != MEAN_OF_ALL).sum())

    @cached_property
    def _mean(self) -> NDArray[np.float64]:
        """The mean of all known rows, made when it is first asked for."""
        total = np.zeros(self.shape[1:], np.float64)
        for start in range(0, self._known, _BLOCK_ROWS):
            stop = min(start + _BLOCK_ROWS, self._known)
            total += _values(self, ((start, stop), *whole(self.shape[1:]))).sum(0, dtype=np.float64)
        return total / max(self._known, 1)


def as_stored(source: Source) -> Source:
    """Return a tensor without the order of rows that it was given."""
    return source.own if isinstance(source, Mapped) else source


def _values(source: Source, box: Box) -> NDArray[np.float32]:
    """Return a box as float32 numbers."""
    found = torch.from_numpy(source.array(box).copy())
    if source.dtype != "F32":
        found = found.view(getattr(torch, DTYPES[source.dtype].torch_name)).to(torch.float32)
    values: NDArray[np.float32] = found.numpy()
    return values


def _stored(values: NDArray[np.floating], dtype: str) -> Array:
    """Return numbers rounded to a dtype, as their bytes are moved."""
    rounded = torch.from_numpy(values).to(getattr(torch, DTYPES[dtype].torch_name)).contiguous()
    flat = rounded.reshape(-1).view(torch.uint8).numpy()
    array: Array = flat.view(storage_type(dtype)).reshape(values.shape)
    return array
