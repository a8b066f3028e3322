"""Trees of codes whose scales belong to groups: along a row, the inputs or the flattened matrix."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..maths.lazy import Tensor, dequantise, torch
from ..specs import DTYPES
from .assembly import Box, Node, Reading, Source, whole

if TYPE_CHECKING:
    from .assembly import Array

# Values that are made at once: the float32 temporaries stay in the cache.
BLOCK_ELEMENTS = 1 << 18
POWERS = {"U8", "F8_E8M0"}
# Which four bits of a word hold AWQ's columns 0 to 7.
_AWQ = [0, 4, 1, 5, 2, 6, 3, 7]


@dataclass(eq=False)
class GroupedValues(Node):
    """A matrix (m, n) of codes with a scale, and perhaps a zero, for each group of a row; float32.

    Attributes:
        codes: (m, w), packed along the row.
        scales: (m, g), one a group of n / g values.
        shape: (m, n).
        bits: of whole numbers, packed into words of 32; 0 for e2m1, two a byte.
        zeros: whole numbers likewise, packed along the other axis: (m · bits / 32, g).
        total: one number for the whole matrix.
        divides: whether scales are divided by `total`, rather than multiplied with it.
    """

    codes: Source
    scales: Source
    shape: tuple[int, ...]
    bits: int = 0
    zeros: Source | None = None
    total: Source | None = None
    divides: bool = False
    dtype: str = "F32"

    def readings(self, box: Box) -> Iterator[Reading]:
        """Yield the rows of codes and of what belongs to them."""
        rows, _ = box
        for part in (self.codes, self.scales):
            yield from part.readings((rows, (0, part.shape[1])))
        if self.zeros is not None:
            yield from self.zeros.readings(self._of_zeros(rows))
        if self.total is not None:
            yield from self.total.readings(whole(self.total.shape))

    def fill(self, box: Box, out: Array) -> None:
        """Write the values, some rows at a time."""
        (begin, end), (left, right) = box
        _, columns = self.shape
        groups = self.scales.shape[1]
        of_all = None if self.total is None else _floats(self.total, whole(self.total.shape))
        step = max(BLOCK_ELEMENTS // max(columns, 1), 1)
        values = torch.from_numpy(out)
        for first in range(begin, end, step):
            rows = (first, min(first + step, end))
            codes = _stored(self.codes, (rows, (0, self.codes.shape[1])))
            made = (
                dequantise.packed_integers(codes, self.bits)
                if self.bits
                else dequantise.e2m1_values(codes)
            )
            made = made[:, :columns].reshape(len(made), groups, -1)
            scales = _floats(self.scales, (rows, (0, groups)))
            if of_all is not None:
                scales = scales / of_all if self.divides else scales * of_all
            if self.zeros is not None:
                made = made - self._zeros(rows)[..., None]
            made = (made * scales[..., None]).flatten(1)
            values[rows[0] - begin : rows[1] - begin].copy_(made[:, left:right])

    def _of_zeros(self, rows: tuple[int, int]) -> Box:
        packed = 32 // self.bits
        return (rows[0] // packed, -(-rows[1] // packed)), (0, self.scales.shape[1])

    def _zeros(self, rows: tuple[int, int]) -> Tensor:
        assert self.zeros is not None
        words = _stored(self.zeros, self._of_zeros(rows))
        first = rows[0] % (32 // self.bits)
        zeros = dequantise.packed_integers(words.T, self.bits).T
        return zeros[first : first + rows[1] - rows[0]]


@dataclass(eq=False)
class Nf4Values(Node):
    """A matrix (m, n) of bitsandbytes' four-bit codes, float32.

    Attributes:
        codes: (m · n / 2, 1), uint8.
        table: (16,), float32: what a code stands for.
        scales: one for each `block` values; codes of `nested` where those are given.
        shape: (m, n), n even.
        block: values that share a scale.
        nested: table, scales, block and offset of the scales' own quantisation.
    """

    codes: Source
    table: Source
    scales: Source
    shape: tuple[int, ...]
    block: int
    nested: tuple[Source, Source, int, float] | None = None
    dtype: str = "F32"

    def readings(self, box: Box) -> Iterator[Reading]:
        """Yield the codes of the rows, their scales, and the tables."""
        codes, scales = self._parts(box[0])
        yield from self.codes.readings((codes, (0, 1)))
        yield from self.scales.readings((scales,))
        yield from self.table.readings(whole(self.table.shape))
        for part in (self.nested or ())[:2]:
            if not isinstance(part, int | float):
                yield from part.readings(whole(part.shape))

    def fill(self, box: Box, out: Array) -> None:
        """Write the values, some rows at a time."""
        (begin, end), (left, right) = box
        _, columns = self.shape
        table = _floats(self.table, whole(self.table.shape))
        step = max(BLOCK_ELEMENTS // max(columns, 1), 1)
        values = torch.from_numpy(out)
        for first in range(begin, end, step):
            rows = (first, min(first + step, end))
            codes, scales = self._parts(rows)
            made = dequantise.nf4_values(
                _stored(self.codes, (codes, (0, 1))).flatten(),
                table,
                self._scales(scales),
                rows[0] * columns % self.block,
                self.block,
            )
            made = made.reshape(-1, columns)
            values[rows[0] - begin : rows[1] - begin].copy_(made[:, left:right])

    def _parts(self, rows: tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int]]:
        """Return which codes and which scales some rows need."""
        first, last = (row * self.shape[1] for row in rows)
        return (first // 2, last // 2), (first // self.block, -(-last // self.block))

    def _scales(self, part: tuple[int, int]) -> Tensor:
        if self.nested is None:
            return _floats(self.scales, (part,))
        table, scales, block, offset = self.nested
        codes = _stored(self.scales, (part,)).int()
        blocks = _floats(scales, whole(scales.shape))[torch.arange(*part) // block]
        return _floats(table, whole(table.shape))[codes] * blocks + offset


@dataclass(eq=False)
class ByInputs(Node):
    """Codes of AWQ and GPTQ, float32, in the shape that they have: a row for each input.

    Attributes:
        shape: (n, m).
        codes: packed along the outputs by AWQ, (n, m · bits / 32), and along the inputs by GPTQ.
        scales: (g, m).
        zeros: (g, m · bits / 32), packed along the outputs.
        bits: of a code, 4 or 8.
        is_awq: whether the eight codes of a word stand in AWQ's order.
        shift: what is added to the zeros.
        groups: (n,), which group an input is in; None where each has as many as the others.
    """

    shape: tuple[int, ...]
    codes: Source
    scales: Source
    zeros: Source
    bits: int
    is_awq: bool
    shift: int = 0
    groups: Source | None = None
    dtype: str = "F32"

    def readings(self, box: Box) -> Iterator[Reading]:
        """Yield the codes of the inputs, and all scales and zeros."""
        yield from self.codes.readings((self._words(box[0]), (0, self.codes.shape[1])))
        for part in (self.scales, self.zeros, self.groups):
            if part is not None:
                yield from part.readings(whole(part.shape))

    def fill(self, box: Box, out: Array) -> None:
        """Write the values, some inputs at a time."""
        (begin, end), (left, right) = box
        packed = 32 // self.bits
        words = (left // packed, -(-right // packed))
        columns = slice(left - words[0] * packed, right - words[0] * packed)
        zeros = self._along_outputs(_stored(self.zeros, (whole(self.zeros.shape)[0], words)))
        zeros = zeros[:, columns].float() + self.shift
        scales = _floats(self.scales, (whole(self.scales.shape)[0], (left, right)))
        size = self.shape[0] // len(scales)
        of_inputs = torch.arange(begin, end) // size
        if self.groups is not None:
            of_inputs = _stored(self.groups, ((begin, end),)).long()
        step = max(BLOCK_ELEMENTS // max(right - left, 1) // packed, 1) * packed
        values = torch.from_numpy(out)
        for first in range(begin, end, step):
            rows = (first, min(first + step, end))
            if self.is_awq:
                codes = self._along_outputs(_stored(self.codes, (rows, words)))[:, columns]
            else:
                taken = _stored(self.codes, (self._words(rows), (left, right)))
                skipped = rows[0] % packed
                codes = dequantise.unsigned_integers(taken.T, self.bits).T
                codes = codes[skipped : skipped + rows[1] - rows[0]]
            part = slice(rows[0] - begin, rows[1] - begin)
            of_rows = of_inputs[part]
            values[part].copy_((codes.float() - zeros[of_rows]) * scales[of_rows])

    def _words(self, rows: tuple[int, int]) -> tuple[int, int]:
        packed = 1 if self.is_awq else 32 // self.bits
        return rows[0] // packed, -(-rows[1] // packed)

    def _along_outputs(self, words: Tensor) -> Tensor:
        codes = dequantise.unsigned_integers(words, self.bits)
        return codes.reshape(len(codes), -1, 8)[..., _AWQ].flatten(1) if self.is_awq else codes


def _stored(source: Source, box: Box) -> Tensor:
    """Return stored values with the dtype that they are stored in."""
    array = source.array(box).copy()  # torch knows no read-only arrays
    return torch.from_numpy(array).view(getattr(torch, DTYPES[source.dtype].torch_name))


def _floats(source: Source, box: Box) -> Tensor:
    """Return scales as float32; whole numbers are powers of two."""
    stored = _stored(source, box)
    return dequantise.power_scales(stored) if source.dtype in POWERS else stored.float()
