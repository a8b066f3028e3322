"""How one expert changes one matrix: by other stored values, by factors, by some rows, or not.

Each gives Δ = W − W0 of a row block in float32. `TaskVectors` works on them and knows no more.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Protocol

import torch
from torch import Tensor

from .low_rank import LowRank
from .passes import subtract


class Change(Protocol):
    """One expert's part of one matrix of shape (m, n)."""

    def subtract(self, base: Tensor, rows: slice, out: Tensor) -> None:
        """Write Δ of some rows.

        Args:
            base: W0 of these rows, float32, shape (b, n), on the device of `out`.
            rows: which ones.
            out: float32, shape (b, n), written over.
        """
        ...

    def is_finite(self, rows: slice) -> bool:
        """Return whether what is stored for these rows holds no NaN and no infinity."""
        ...

    def touches(self, rows: slice) -> bool:
        """Return whether Δ may differ from zero in these rows."""
        ...


@dataclass(frozen=True, slots=True)
class Dense:
    """Another checkpoint's values W, as stored, shape (m, n), any float dtype."""

    values: Tensor

    def subtract(self, base: Tensor, rows: slice, out: Tensor) -> None:
        """Write W − W0; values cross to the device in their stored dtype, half of float32."""
        subtract(self.values[rows], base, out)

    def is_finite(self, rows: slice) -> bool:
        """Return whether W is finite there."""
        return bool(torch.isfinite(self.values[rows].float()).all())

    def touches(self, rows: slice) -> bool:
        """Return True: only looking tells."""
        return True


@dataclass(frozen=True, slots=True)
class Unchanged:
    """An adapter that leaves this matrix alone: Δ = 0."""

    def subtract(self, base: Tensor, rows: slice, out: Tensor) -> None:
        """Write zeros."""
        out.zero_()

    def is_finite(self, rows: slice) -> bool:
        """Return True."""
        return True

    def touches(self, rows: slice) -> bool:
        """Return False."""
        return False


@dataclass(frozen=True, slots=True)
class Factored:
    """An adapter's Δ = L·Rᵀ."""

    factors: LowRank

    def subtract(self, base: Tensor, rows: slice, out: Tensor) -> None:
        """Write L·Rᵀ of these rows."""
        torch.mm(self.factors.left[rows].float(), self.factors.right.float().T, out=out)

    def is_finite(self, rows: slice) -> bool:
        """Return whether both factors are finite."""
        return self.factors.is_finite()

    def touches(self, rows: slice) -> bool:
        """Return whether L has anything in these rows."""
        return bool(self.factors.left[rows].any())


@dataclass(frozen=True, slots=True)
class FactoredStack:
    """An adapter's Δ of a stack [E, m, n], each slice as one row of length m·n."""

    slices: Sequence[LowRank]

    def subtract(self, base: Tensor, rows: slice, out: Tensor) -> None:
        """Write the slices' products."""
        for row, factors in zip(out, self.slices[rows], strict=True):
            product = factors.left.float() @ factors.right.float().T
            row.copy_(product.flatten())

    def is_finite(self, rows: slice) -> bool:
        """Return whether all factors are finite."""
        return all(factors.is_finite() for factors in self.slices[rows])

    def touches(self, rows: slice) -> bool:
        """Return whether a slice has anything."""
        return any(bool(factors.left.any()) for factors in self.slices[rows])


@dataclass(frozen=True, slots=True)
class Rescaled:
    """DoRA: W = g·(W0 + L·Rᵀ) with g = magnitude / ‖W0 + L·Rᵀ‖ of each row, or each column.

    Liu et al. 2024, https://arxiv.org/abs/2402.09353; the norms are of the base as it is merged,
    as PEFT takes them.

    Attributes:
        factors: of what is added before the rescaling.
        magnitude: float32 or float64; of each row, shape (m,), or of each column, (n,).
        norms: ‖W0 + L·Rᵀ‖ of each column, float64; None where the magnitude is the rows', whose
            norms each block gives itself.
    """

    factors: LowRank
    magnitude: Tensor
    norms: Tensor | None = None

    def subtract(self, base: Tensor, rows: slice, out: Tensor) -> None:
        """Write (g − 1)·W0 + g·L·Rᵀ, worked out in float64."""
        W0 = base.double()
        moved = self.factors.left[rows].double() @ self.factors.right.double().T
        if self.norms is None:
            norms = torch.linalg.vector_norm(W0 + moved, dim=1, keepdim=True)
            gain = self.magnitude[rows].double()[:, None] / norms
        else:
            gain = self.magnitude.double() / self.norms
        out.copy_((gain - 1) * W0 + gain * moved)

    def is_finite(self, rows: slice) -> bool:
        """Return whether factors and magnitudes are finite."""
        return self.factors.is_finite() and bool(torch.isfinite(self.magnitude).all())

    def touches(self, rows: slice) -> bool:
        """Return True."""
        return True


@dataclass(frozen=True, slots=True)
class ReplacedRows:
    """Some rows have other values, as trained tokens of an embedding; the others are unchanged.

    Attributes:
        indices: which rows of the matrix, ascending, int64.
        values: their W, shape (k, n).
    """

    indices: Tensor
    values: Tensor

    def subtract(self, base: Tensor, rows: slice, out: Tensor) -> None:
        """Write W − W0 of the rows that were replaced, zeros elsewhere."""
        out.zero_()
        for position in self._inside(rows):
            row = int(self.indices[position]) - rows.start
            out[row] = self.values[position].to(out.device, torch.float32) - base[row]

    def is_finite(self, rows: slice) -> bool:
        """Return whether the replaced rows are finite."""
        return all(bool(torch.isfinite(self.values[i].float()).all()) for i in self._inside(rows))

    def touches(self, rows: slice) -> bool:
        """Return whether any of these rows is replaced."""
        return bool(self._inside(rows))

    def _inside(self, rows: slice) -> list[int]:
        inside = (self.indices >= rows.start) & (self.indices < rows.stop)
        found: list[int] = inside.nonzero().flatten().tolist()
        return found


@dataclass(frozen=True, slots=True)
class Sum:
    """Several changes at once, as of a saved embedding with an adapter on it."""

    changes: Sequence[Change]

    def subtract(self, base: Tensor, rows: slice, out: Tensor) -> None:
        """Write the sum of all."""
        self.changes[0].subtract(base, rows, out)
        more = torch.empty_like(out)
        for change in self.changes[1:]:
            change.subtract(base, rows, more)
            out.add_(more)

    def is_finite(self, rows: slice) -> bool:
        """Return whether all are finite."""
        return all(change.is_finite(rows) for change in self.changes)

    def touches(self, rows: slice) -> bool:
        """Return whether any does."""
        return any(change.touches(rows) for change in self.changes)


def are_same(one: object, other: object) -> bool:
    """Return whether two changes hold the same: of one kind, with equal tensors."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if is_dataclass(one) and type(one) is type(other):
        names = [item.name for item in fields(one)]
        return all(are_same(getattr(one, name), getattr(other, name)) for name in names)
    if isinstance(one, Sequence) and isinstance(other, Sequence):
        return len(one) == len(other) and all(map(are_same, one, other))
    return one is other
