"""From what an adapter stores about a piece to how it changes that piece's matrix."""

from collections.abc import Callable

import torch
from torch import Tensor

from ..maths.changes import (
    Change,
    Dense,
    Factored,
    FactoredStack,
    ReplacedRows,
    Rescaled,
    Sum,
    Unchanged,
)
from ..maths.low_rank import LowRank
from ..maths.stored_bytes import as_tensor
from ..sources import Checkpoint
from ..sources.adapter import EditRows
from ..sources.adapter_layout import Factor
from .pieces import Piece

# Rows of the base that DoRA's norms of columns are summed over at once.
_NORM_ROWS = 4096


def change_of(
    read: EditRows, piece: Piece, base: Checkpoint, cross: Callable[[Tensor], Tensor]
) -> Change:
    """Return how an adapter changes the rows of a piece.

    Args:
        read: what the adapter stores about them.
        piece: the rows.
        base: the checkpoint that gives the layout; read for DoRA's norms of columns only.
        cross: takes a tensor to where the arithmetic happens.
    """
    if read.edit is None:
        return Unchanged()
    return _Builder(read, piece, base, cross).change()


class _Builder:
    """Makes the change of one piece."""

    def __init__(
        self,
        read: EditRows,
        piece: Piece,
        base: Checkpoint,
        cross: Callable[[Tensor], Tensor],
    ) -> None:
        if read.edit is None:
            raise ValueError("this adapter leaves the tensor alone")
        self._read, self._edit, self._piece = read, read.edit, piece
        self._base, self._cross = base, cross

    def change(self) -> Change:
        """Return all of it: other values first, then what is added to them."""
        edit, found = self._edit, list[Change]()
        if edit.stored is not None and self._read.stored is not None:
            dtype = self._read.specs[edit.stored].dtype
            values = as_tensor(self._read.stored, dtype, self._piece.read_shape)
            found.append(Dense(self._cross(self._piece.part_of(values))))
        if edit.tokens is not None:
            key, indices = edit.tokens
            where = torch.tensor(indices, dtype=torch.int64) - self._piece.rows.start
            found.append(ReplacedRows(where, self._tensor(key)))
        if edit.magnitude is not None:
            found.append(self._rescaled(*edit.magnitude))
        elif edit.terms and len(edit.spec.shape) == 3 and not self._piece.is_slice:
            experts = range(self._piece.rows.start, self._piece.rows.stop)
            found.append(FactoredStack([self._low_rank(expert) for expert in experts]))
        elif edit.terms:
            rows = self._piece.rows
            if self._piece.is_slice:
                found.append(Factored(self._placed(self._low_rank(rows.start))))
            else:
                whole = self._low_rank(None)
                found.append(Factored(self._placed(LowRank(whole.left[rows], whole.right))))
        if edit.bias is not None:
            key, scale = edit.bias
            added = self._tensor(key).flatten()[self._piece.rows].double() * scale
            left, right = added.float()[:, None], torch.ones(1, 1)
            found.append(Factored(LowRank(self._cross(left), self._cross(right))))
        return found[0] if len(found) == 1 else Sum(found)

    def _placed(self, read: LowRank) -> LowRank:
        """Return the part of what was read that the piece is about."""
        rows, columns = self._piece.place
        left, right = read.left[rows], read.right[columns]
        return LowRank(right, left) if self._piece.is_turned else LowRank(left, right)

    def _low_rank(self, expert: int | None) -> LowRank:
        """Return the sum of the terms of the tensor, or of one matrix of a stack; float32."""
        spec = self._edit.spec
        height, width = spec.shape[-2:] if expert is not None else spec.matrix_shape
        lefts, rights = [], []
        for term in self._edit.terms:
            if expert is not None and term.expert is not None and term.expert != expert:
                continue
            index = term.expert if term.expert is not None else expert
            left, right = self._factor(term.left, index), self._factor(term.right, index)
            # The scale is no power of two as a rule: one rounding, of the product.
            left, right = (left.double() * term.scale).float(), right.float()
            lefts.append(_in_rows(left, term.place[0], height))
            rights.append(_in_rows(right, term.place[1], width))
        if not lefts:
            return LowRank(torch.zeros(height, 0), torch.zeros(width, 0))
        return LowRank(self._cross(torch.cat(lefts, 1)), self._cross(torch.cat(rights, 1)))

    def _factor(self, factor: Factor, expert: int | None) -> Tensor:
        """Return a factor as (rows, r)."""
        stored = self._tensor(factor.key)
        if factor.pick != "whole" and expert is None:
            raise ValueError(f"{factor.key} is of many experts, and none was asked for")
        if factor.pick == "rows":
            stored = stored.chunk(factor.count, dim=0)[expert or 0]
        elif factor.pick == "columns":
            stored = stored[:, (expert or 0) :: factor.count]
        elif factor.pick == "stack":
            stored = stored[min(expert or 0, factor.count - 1)]
        else:
            stored = stored.flatten(1)  # a convolution's: rows by the rest
        return (stored.T if factor.transposed else stored)[factor.rows]

    def _rescaled(self, key: str, columns: bool) -> Rescaled:
        whole = self._low_rank(None)
        magnitude = self._cross(self._tensor(key).flatten())
        rows = self._piece.rows
        own = self._placed(LowRank(whole.left[rows], whole.right))
        in_rows, in_columns = self._piece.place
        if columns:
            norms = self._column_norms(whole)
            return Rescaled(own, magnitude[in_columns], norms[in_columns])
        return Rescaled(own, magnitude[rows][in_rows])

    def _column_norms(self, added: LowRank) -> Tensor:
        """Return ‖W0 + L·Rᵀ‖ of each column, float64: one pass over the base's tensor."""
        spec = self._base.tensors[self._edit.spec.name].spec
        m, n = spec.matrix_shape
        total = added.right.new_zeros(n, dtype=torch.float64)
        for start in range(0, m, _NORM_ROWS):
            rows = slice(start, min(start + _NORM_ROWS, m))
            stored = self._base.read(spec.name, rows)
            values = self._cross(as_tensor(stored, spec.dtype, (rows.stop - start, n)))
            moved = added.left[rows].double() @ added.right.double().T
            total += (values.double() + moved).square().sum(0)
        return total.sqrt()

    def _tensor(self, key: str) -> Tensor:
        spec = self._read.specs[key]
        return as_tensor(self._read.whole[key], spec.dtype, spec.shape)


def _in_rows(factor: Tensor, rows: slice, height: int) -> Tensor:
    """Return a factor with zeros in all rows but its own."""
    if len(factor) == height:
        return factor
    placed = factor.new_zeros(height, factor.shape[1])
    placed[rows] = factor
    return placed
