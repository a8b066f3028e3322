"""Tensors put together from stored ones: sliced, turned, joined, stacked; read box by box.

A `Source` tensor is a small tree whose leaves are tensors of a store. Nothing is read until
`fill` is called, and then only the rows that a box needs; no step holds a copy beside the result.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from ..maths.lazy import np, torch
from ..specs import DTYPES
from .store import Store, StoredTensor

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[np.generic]

# From where to where on each axis.
Box = tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Reading:
    """Rows of a stored tensor that have to be read."""

    store: Store
    tensor: StoredTensor
    rows: slice

    @property
    def place(self) -> tuple[str, int, int]:
        """The file, and where in it the rows begin and end."""
        return self.tensor.file, *self.tensor.byte_range(self.rows)


class Source(Protocol):
    """A tensor that can be read in boxes.

    Attributes:
        shape: sizes, outermost first.
        dtype: a key of `DTYPES`.
    """

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes, outermost first."""
        ...

    @property
    def dtype(self) -> str:
        """A key of `DTYPES`."""
        ...

    def readings(self, box: Box) -> Iterator[Reading]:
        """Yield which stored rows a box needs."""
        ...

    def array(self, box: Box) -> Array:
        """Return a box's values; a view of the stored bytes where that can be."""
        ...

    def fill(self, box: Box, out: Array) -> None:
        """Write a box's values into an array of its shape."""
        ...


def whole(shape: Sequence[int]) -> Box:
    """Return the box that is all of a tensor."""
    return tuple((0, size) for size in shape)


def storage_type(dtype: str) -> Any:
    """Return the numpy type that values of a dtype are moved as: their bytes as they are."""
    return np.dtype(np.float32) if dtype == "F32" else np.dtype(f"u{DTYPES[dtype].nbytes}")


class Node(ABC):
    """What all trees share: `array` and `fill`, each made of the other."""

    shape: tuple[int, ...]
    dtype: str

    @abstractmethod
    def readings(self, box: Box) -> Iterator[Reading]:
        """Yield which stored rows a box needs."""

    def array(self, box: Box) -> Array:
        """Return a box's values; a view of the stored bytes where that can be."""
        out = np.empty([stop - start for start, stop in box], storage_type(self.dtype))
        self.fill(box, out)
        return out

    def fill(self, box: Box, out: Array) -> None:
        """Write a box's values into an array of its shape."""
        out[...] = self.array(box)


class Stored(Node):
    """A tensor as it is stored."""

    def __init__(self, store: Store, tensor: StoredTensor) -> None:
        self.store, self.tensor, self.name = store, tensor, tensor.spec.name
        self.shape, self.dtype = tensor.spec.shape, tensor.spec.dtype

    def readings(self, box: Box) -> Iterator[Reading]:
        """Yield the rows: all columns of a row lie together."""
        yield Reading(self.store, self.tensor, slice(*(box[0] if box else (0, 1))))

    def array(self, box: Box) -> Array:
        """Return a view of the rows that were read."""
        (reading,) = self.readings(box)
        data = self.store.read(*reading.place)
        rows = np.frombuffer(data, storage_type(self.dtype))
        if not box:
            return rows.reshape(())
        inner = tuple(slice(*span) for span in box[1:])
        shaped: Array = rows.reshape(box[0][1] - box[0][0], *self.shape[1:])[(slice(None), *inner)]
        return shaped


class Transposed(Node):
    """A tensor with its axes in another order, as `numpy.transpose` takes them."""

    def __init__(self, of: Source, axes: tuple[int, ...]) -> None:
        self.of, self.axes = of, axes
        self.shape, self.dtype = tuple(of.shape[axis] for axis in axes), of.dtype

    def readings(self, box: Box) -> Iterator[Reading]:
        """Yield what the turned box needs."""
        yield from self.of.readings(self._inner(box))

    def array(self, box: Box) -> Array:
        """Return the turned view."""
        return self.of.array(self._inner(box)).transpose(self.axes)

    def fill(self, box: Box, out: Array) -> None:
        """Write into the array turned back."""
        self.of.fill(self._inner(box), out.transpose(self._back()))

    def _back(self) -> tuple[int, ...]:
        return tuple(sorted(range(len(self.axes)), key=self.axes.__getitem__))

    def _inner(self, box: Box) -> Box:
        return tuple(box[axis] for axis in self._back())


class Part(Node):
    """Every `step`-th index of one axis from `start` on: a chunk, or one of two woven tensors."""

    def __init__(self, of: Source, axis: int, start: int, size: int, step: int = 1) -> None:
        self.of, self.axis, self.start, self.step = of, axis, start, step
        self.shape = (*of.shape[:axis], size, *of.shape[axis + 1 :])
        self.dtype = of.dtype

    def readings(self, box: Box) -> Iterator[Reading]:
        """Yield what the wider box needs."""
        yield from self.of.readings(self._inner(box))

    def array(self, box: Box) -> Array:
        """Return a view of every `step`-th index."""
        step = (*[slice(None)] * self.axis, slice(None, None, self.step))
        kept: Array = self.of.array(self._inner(box))[step]
        return kept

    def fill(self, box: Box, out: Array) -> None:
        """Write straight on where nothing is skipped."""
        if self.step == 1:
            self.of.fill(self._inner(box), out)
        else:
            out[...] = self.array(box)

    def _inner(self, box: Box) -> Box:
        begin, end = box[self.axis]
        start = self.start + begin * self.step
        stop = start + max(end - begin - 1, 0) * self.step + (end > begin)
        return (*box[: self.axis], (start, stop), *box[self.axis + 1 :])


class Item(Node):
    """One index of the first axis, which goes away."""

    def __init__(self, of: Source, index: int) -> None:
        self.of, self.index = of, index
        self.shape, self.dtype = of.shape[1:], of.dtype

    def readings(self, box: Box) -> Iterator[Reading]:
        """Yield what that one index needs."""
        yield from self.of.readings(self._inner(box))

    def array(self, box: Box) -> Array:
        """Return a view without the first axis."""
        item: Array = self.of.array(self._inner(box))[0]
        return item

    def fill(self, box: Box, out: Array) -> None:
        """Write with the first axis put back."""
        self.of.fill(self._inner(box), out[None])

    def _inner(self, box: Box) -> Box:
        return ((self.index, self.index + 1), *box)


class Stacked(Node):
    """Tensors of one shape along a new first axis."""

    def __init__(self, parts: Sequence[Source]) -> None:
        self.parts = tuple(parts)
        self.shape, self.dtype = (len(self.parts), *self.parts[0].shape), self.parts[0].dtype

    def readings(self, box: Box) -> Iterator[Reading]:
        """Yield what each part in the box needs."""
        for part in self.parts[slice(*box[0])]:
            yield from part.readings(box[1:])

    def fill(self, box: Box, out: Array) -> None:
        """Write part after part."""
        for number, part in enumerate(self.parts[slice(*box[0])]):
            part.fill(box[1:], out[number, ...])


class _Along(Node):
    """Several tensors along an axis; how they share it is `_within`."""

    def __init__(self, parts: Sequence[Source], axis: int) -> None:
        self.parts, self.axis = tuple(parts), axis
        first = self.parts[0]
        size = sum(part.shape[axis] for part in self.parts)
        self.shape = (*first.shape[:axis], size, *first.shape[axis + 1 :])
        self.dtype = first.dtype

    def readings(self, box: Box) -> Iterator[Reading]:
        """Yield what each part in the box needs."""
        for part, inner, _ in self._within(box):
            yield from part.readings(inner)

    def fill(self, box: Box, out: Array) -> None:
        """Write each part where its places are."""
        for part, inner, place in self._within(box):
            part.fill(inner, out[(*[slice(None)] * self.axis, place)])

    @abstractmethod
    def _within(self, box: Box) -> Iterator[tuple[Source, Box, slice]]:
        """Yield the parts that a box touches, where in each, and where in the result."""


class Joined(_Along):
    """Tensors one after the other along an axis."""

    def _within(self, box: Box) -> Iterator[tuple[Source, Box, slice]]:
        begin, end = box[self.axis]
        offset = 0
        for part in self.parts:
            size = part.shape[self.axis]
            start, stop = max(begin - offset, 0), min(end - offset, size)
            if start < stop:
                inner = (*box[: self.axis], (start, stop), *box[self.axis + 1 :])
                place = slice(offset + start - begin, offset + stop - begin)
                yield part, inner, place
            offset += size


class Woven(_Along):
    """Tensors of one shape that take turns along an axis: gate, up, gate, up, …"""

    def _within(self, box: Box) -> Iterator[tuple[Source, Box, slice]]:
        begin, end = box[self.axis]
        count = len(self.parts)
        for number, part in enumerate(self.parts):
            first = begin + (number - begin) % count  # the first place in the box that is its turn
            if first < end:
                start, stop = first // count, -(-(end - number) // count)
                inner = (*box[: self.axis], (start, stop), *box[self.axis + 1 :])
                yield part, inner, slice(first - begin, None, count)


class Reshaped(Node):
    """A tensor whose axes after the first are cut another way: a convolution as a linear map."""

    def __init__(self, of: Source, shape: tuple[int, ...]) -> None:
        self.of, self.shape, self.dtype = of, shape, of.dtype

    def readings(self, box: Box) -> Iterator[Reading]:
        """Yield the rows."""
        yield from self.of.readings((box[0], *whole(self.of.shape[1:])))

    def array(self, box: Box) -> Array:
        """Return the rows in the new shape."""
        rows = self.of.array((box[0], *whole(self.of.shape[1:])))
        inner = tuple(slice(*span) for span in box[1:])
        shaped: Array = rows.reshape(len(rows), *self.shape[1:])[(slice(None), *inner)]
        return shaped


class Rounded(Node):
    """Float32 values in an output dtype, rounded to nearest even."""

    def __init__(self, of: Source, dtype: str) -> None:
        self.of, self.shape, self.dtype = of, of.shape, dtype

    def readings(self, box: Box) -> Iterator[Reading]:
        """Yield what the values need."""
        yield from self.of.readings(box)

    def array(self, box: Box) -> Array:
        """Return the rounded values."""
        values = torch.from_numpy(self.of.array(box))
        rounded = values.to(getattr(torch, DTYPES[self.dtype].torch_name))
        flat = rounded.contiguous().reshape(-1).view(torch.uint8).numpy()
        array: Array = flat.view(storage_type(self.dtype)).reshape(values.shape)
        return array
