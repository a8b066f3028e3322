"""WIDEN: weigh each column of each expert by how much its length and its direction changed.

Yu et al. 2024, https://arxiv.org/abs/2408.03092; public code yule-BUAA/MergeLLM. For every column c
of a matrix, the change of its length | ‖Wᵢ[:,c]‖ − ‖W0[:,c]‖ | and of its direction
1 − cos(Wᵢ[:,c], W0[:,c]) are ranked within the expert, R ∈ {0, 1/n, …}; a softmax over the experts
turns ranks into scores, and ranks above t times their mean get the score `scale`. The update of a
column is Σ Δᵢ[:,c]·(both scores' mean). Embeddings are taken by row. One-dimensional tensors use
|Δᵢ| in place of ranks. The tiny 1 − cos is computed in float64 from the part of Δ that is
orthogonal to W0, without the code's cancellation; ties are broken by position, as there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..maths.lazy import TaskVectors, Tensor, torch
from ..memory import BLOCK_ELEMENTS
from ..roles import Role
from ..specs import TensorSpec
from .base import MergeMethod, Rule, Site, Update, default_role, param


@dataclass(frozen=True, kw_only=True)
class Widen(MergeMethod):
    """Every column of every expert counts by how far training moved its length and direction,
    compared with that expert's other columns and with the other experts."""

    name: ClassVar[str] = "widen"
    title: ClassVar[str] = "WIDEN"
    paper: ClassVar[str] = "Yu et al. 2024, Extend model merging (WIDEN)"
    url: ClassVar[str] = "https://arxiv.org/abs/2408.03092"

    t: float = param(1.0, "Ranks above t times the mean count in full", minimum=0.0, maximum=100.0)
    scale: float = param(1.0, "Score of those ranks", minimum=0.0, maximum=10.0)

    def rule_for(self, spec: TensorSpec, experts: int) -> Rule:
        """Return the one rule; columns are those of whole tensors."""
        # Slices of a stack [E, m, n] are matrices of their own.
        stacked = len(spec.shape) == 3
        return Rule("widen", default_role(spec), needs_matrix=stacked, in_pieces=False)

    def kept_bytes(self, spec: TensorSpec, rule: Rule, experts: int) -> int:
        """Return bytes of the columns' sums, changes, ranks and scores: float64, four at once."""
        rows, columns = spec.shape[-2:] if len(spec.shape) == 3 else spec.matrix_shape
        if len(spec.shape) < 2 or rule.role is Role.EMBEDDING:
            columns = rows
        return 8 * columns * (5 * experts + 5)

    def merge(self, vectors: TaskVectors, site: Site) -> Update:
        """Return Σ Δᵢ times the scores of their columns (rows of an embedding)."""
        if len(site.spec.shape) < 2:
            return self._vector(vectors)
        by_row = site.rule.role is Role.EMBEDDING
        magnitude, direction = _column_changes(vectors, by_row)
        scores = self._scores(_rank(magnitude))
        del magnitude
        scores.add_(self._scores(_rank(direction))).div_(2)
        del direction

        def rows(block: slice, stack: Tensor) -> Tensor:
            factors = scores[:, block, None] if by_row else scores[:, None, :]
            return (stack * factors.float()).sum(0)

        return Update(rows, "widen")

    def _vector(self, vectors: TaskVectors) -> Update:
        magnitude = torch.cat([vectors.stack(block).abs() for block in vectors.blocks()], dim=1)
        scores = self._scores(magnitude[..., 0].double())

        def rows(block: slice, stack: Tensor) -> Tensor:
            return (stack * scores[:, block, None].float()).sum(0)

        return Update(rows, "widen")

    def _scores(self, ranks: Tensor) -> Tensor:
        """Return a score for each expert and column: softmax over experts, `scale` above t·mean."""
        scores = torch.softmax(ranks, dim=0)
        return torch.where(ranks > self.t * ranks.mean(1, keepdim=True), self.scale, scores)


def _rank(change: Tensor) -> Tensor:
    """Put each expert's ranks, in [0, 1), in place of its changes: shape (N, columns), float64."""
    places = torch.arange(change.shape[1], dtype=torch.float64, device=change.device)
    places /= change.shape[1]
    for row in change:
        row.scatter_(0, row.argsort(stable=True), places)
    return change


def _column_changes(vectors: TaskVectors, by_row: bool) -> tuple[Tensor, Tensor]:
    """Return how far each column's length and direction moved; float64, shape (N, columns)."""
    axis = 1 if by_row else 0
    sums: list[list[Tensor]] = []
    for block in vectors.blocks():
        stack, base = vectors.stack(block), vectors.base(block)
        own = [
            (base * base).sum(axis, dtype=torch.float64),
            (stack * base).sum(axis + 1, dtype=torch.float64),
            (stack * stack).sum(axis + 1, dtype=torch.float64),
        ]
        if by_row or not sums:
            sums.append(own)
        else:
            for total, part in zip(sums[0], own, strict=True):
                total += part
    b2, bd, d2 = (torch.cat(parts, dim=-1) for parts in zip(*sums, strict=True))
    del sums
    magnitude, direction = torch.empty_like(bd), torch.empty_like(bd)
    for start in range(0, len(b2), BLOCK_ELEMENTS):
        some = slice(start, start + BLOCK_ELEMENTS)
        magnitude[:, some], direction[:, some] = _changes(b2[some], bd[:, some], d2[:, some])
    return magnitude, direction


def _changes(b2: Tensor, bd: Tensor, d2: Tensor) -> tuple[Tensor, Tensor]:
    """Return the changes of some columns' length and direction: shape (N, columns).

    Args:
        b2: ‖W0‖² of each column, shape (columns,).
        bd, d2: ⟨W0, Δᵢ⟩ and ‖Δᵢ‖², shape (N, columns).
    """
    M_base = b2.sqrt()
    M_expert = (b2 + 2 * bd + d2).clamp_min(0).sqrt()
    # |‖W‖ − ‖W0‖| = |2⟨W0, Δ⟩ + ‖Δ‖²| / (‖W‖ + ‖W0‖), which does not cancel.
    magnitude = (2 * bd + d2).abs() / (M_expert + M_base).clamp_min(1e-300)
    # sin² = ‖Δ⊥‖² / ‖W‖² and 1 − cos = sin² / (1 + cos); a zero column has no direction.
    orthogonal = (d2 - bd * bd / b2.clamp_min(1e-300)).clamp_min(0)
    cosine = (b2 + bd) / (M_base * M_expert).clamp_min(1e-300)
    sine_sq = orthogonal / (M_expert * M_expert).clamp_min(1e-300)
    direction = torch.where(cosine > 0, sine_sq / (1 + cosine).clamp_min(1e-3), 1 - cosine)
    alive = (M_base > 0) & (M_expert > 0)
    return magnitude, torch.where(alive, direction, 0.0)


METHOD = Widen
