"""Exact magnitude thresholds without sorting: |Δ| counted by the bits of its float32 pattern.

Float32 patterns of non-negative numbers are ordered like the numbers. A first pass counts their
upper 16 bits, a second the lower 16 inside the bin where the threshold lies; both together give the
K-th largest magnitude exactly, whatever the number of elements. For one tensor, which is at hand,
one pass with a bracket is tried first (`running_rank`). Not a method itself.

Tried in vain: one expert a core (W0 is read for each, and two cores gain nothing); `bincount` (1.1
ns an element), `kthvalue` (4.7), `numpy.partition` (11 to 17); selecting what lies in the
threshold's bin before the second count, whose mask costs what it saves.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from ...maths.lazy import TaskVectors, Tensor, torch
from ..base import Each, Site, of_each
from .running_rank import RunningRank

_UPPER = 1 << 15  # the sign bit is clear
_LOWER = 1 << 16


class Tally:
    """Counts magnitudes, for each expert.

    Args:
        experts: N.
        bins: None counts the upper 16 bits; else the lower 16 inside one upper bin an expert.
    """

    def __init__(self, experts: int, bins: Sequence[int] | None = None) -> None:
        self._bins = bins
        size = _UPPER if bins is None else _LOWER
        self.counts = torch.zeros(experts, size, dtype=torch.int64)
        self._inside: list[list[Tensor]] = [[] for _ in range(experts)]

    def add(self, stack: Tensor | Sequence[Tensor], experts: Sequence[int] | None = None) -> None:
        """Count a row block of some experts, N times (b, n); of all when they have no numbers."""
        for i, delta in zip(experts or range(len(stack)), stack, strict=True):
            bits = delta.abs().view(torch.int32).flatten()
            keys = bits >> 16
            if self._bins is None:
                self._count(i, keys)
                continue
            # The few inside the bin are gathered, since a count costs as much as all the bins.
            self._inside[i].append(bits[keys == self._bins[i]] & (_LOWER - 1))
            if sum(map(len, self._inside[i])) > _LOWER:
                self._count_inside(i)

    def _count(self, expert: int, keys: Tensor) -> None:
        counts = self.counts[expert]
        counts += torch.bincount(keys, minlength=len(counts)).cpu()

    def _count_inside(self, expert: int) -> None:
        self._count(expert, torch.cat(self._inside[expert]))
        self._inside[expert].clear()

    def find(self, ranks: Sequence[int]) -> tuple[list[int], list[int]]:
        """Return the slot that holds each expert's `rank`-th largest, and its rank inside."""
        slots, inside = [], []
        for expert, gathered in enumerate(self._inside):
            if gathered:
                self._count_inside(expert)
        for counts, rank in zip(self.counts, ranks, strict=True):
            from_top = counts.flip(0).cumsum(0)
            position = int((from_top >= rank).nonzero()[0])
            slots.append(len(counts) - 1 - position)
            inside.append(rank - (int(from_top[position - 1]) if position else 0))
        return slots, inside


def keep_count(numel: int, density: float) -> int:
    """Return ⌊density · numel⌋, at least 1."""
    return max(int(density * numel), 1)


def tensor_thresholds(
    vectors: TaskVectors,
    density: Each,
    change: Callable[[slice, Tensor], Sequence[Tensor] | Tensor] | None = None,
) -> list[float]:
    """Return for each expert the ⌊density · numel⌋-th largest |Δ| of one tensor.

    A density of 1 or more keeps everything (threshold 0), one of 0 nothing (infinity).

    Args:
        vectors: the task vectors of the whole tensor.
        density: share to keep, of all experts or of each.
        change: what to count of a row block instead of its Δ.
    """
    m, n = vectors.shape
    densities = of_each(density, vectors.count)
    ranks = [keep_count(m * n, share) if 0 < share < 1 and m * n else None for share in densities]
    found = magnitudes_at(vectors, ranks, change)
    edges = [math.inf if share <= 0 else 0.0 for share in densities]
    return [edge if tau is None else tau for tau, edge in zip(found, edges, strict=True)]


def magnitudes_at(
    vectors: TaskVectors,
    ranks: Sequence[int | None],
    change: Callable[[slice, Tensor], Sequence[Tensor] | Tensor] | None = None,
) -> list[float | None]:
    """Return the magnitude at a rank, counted from the largest, of each of several streams.

    Args:
        vectors: the task vectors of a whole tensor.
        ranks: one a stream; None asks for nothing.
        change: the streams' parts of a row block, (b, n) each; the experts' Δ when None.
    """
    asked = [number for number, rank in enumerate(ranks) if rank is not None]
    wanted = [rank for rank in ranks if rank is not None]
    found: list[float | None] = [None] * len(ranks)
    if not asked:
        return found

    def streams() -> Iterator[list[Tensor]]:
        for rows in _scattered(vectors.blocks()):
            stack = vectors.stack(rows)
            parts = stack if change is None else change(rows, stack)
            yield [parts[number] for number in asked]

    m, n = vectors.shape
    values = None
    if vectors.device.type == "cpu":
        values = _running_thresholds(streams(), wanted, m * n)
    if values is None:
        upper = Tally(len(asked))
        for stack in streams():
            upper.add(stack)
        bins, inside = upper.find(wanted)
        lower = Tally(len(asked), bins)
        for stack in streams():
            lower.add(stack)
        values = _thresholds(bins, lower, inside)
    for number, value in zip(asked, values, strict=True):
        found[number] = value
    return found


def _scattered(blocks: Sequence[slice]) -> list[slice]:
    """Return the blocks in an order in which the first ones are like all of them.

    Rows of an embedding, say, are ordered by how frequent their tokens are.
    """
    golden = (math.sqrt(5) - 1) / 2
    return [blocks[i] for i in sorted(range(len(blocks)), key=lambda i: i * golden % 1)]


def _running_thresholds(
    stacks: Iterable[Sequence[Tensor]], ranks: Sequence[int], total: int
) -> list[float] | None:
    """Return the thresholds from one pass, or None where it does not suffice."""
    finders = [RunningRank(rank, total) for rank in ranks]
    for stack in stacks:
        for finder, delta in zip(finders, stack, strict=True):
            finder.add(delta.flatten().numpy())
    patterns = [finder.result() for finder in finders]
    return None if None in patterns else [magnitude(p) for p in patterns if p is not None]


class ModelThresholds:
    """The same over all tensors: two counting passes, whose results are named ``trim_…``.

    Args:
        number: of the pass, 0 or 1.
        counted: the first pass's results, for the second.
        experts: N.
        density: share to keep, of all experts or of each.
    """

    def __init__(
        self, number: int, counted: Mapping[str, Any], experts: int, density: Each
    ) -> None:
        self._densities = of_each(density, experts)
        self._bins: list[int] | None = counted["trim_bins"] if number else None
        self._ranks: list[int] = counted["trim_ranks"] if number else []
        self._tally = Tally(experts, self._bins)

    def add(self, vectors: TaskVectors, site: Site) -> None:
        """Count a matrix, or some rows of one."""
        for rows in vectors.blocks():
            self._tally.add(vectors.stack(rows), site.experts)

    def result(self) -> dict[str, Any]:
        """Return bins and ranks after the first pass, ``trim_thresholds`` after the second."""
        if self._bins is not None:
            return {"trim_thresholds": _thresholds(self._bins, self._tally, self._ranks)}
        totals = self._tally.counts.sum(1).tolist()
        if not all(totals):
            return {"trim_bins": [0] * len(totals), "trim_ranks": []}
        bins, ranks = self._tally.find(
            [keep_count(total, share) for total, share in zip(totals, self._densities, strict=True)]
        )
        return {"trim_bins": bins, "trim_ranks": ranks}


def _thresholds(bins: Sequence[int], lower: Tally, ranks: Sequence[int]) -> list[float]:
    if not len(ranks):
        return [0.0] * len(bins)
    slots, _ = lower.find(ranks)
    return [magnitude((upper << 16) + slot) for upper, slot in zip(bins, slots, strict=True)]


def magnitude(pattern: int) -> float:
    """Return the non-negative float32 number with a bit pattern."""
    return float(struct.unpack("<f", struct.pack("<I", pattern))[0])
