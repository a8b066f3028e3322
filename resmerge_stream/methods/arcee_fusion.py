"""Arcee Fusion: of one model, take over the changes that matter much more than most.

mergekit ``arcee_fusion`` (0.1.5). An entry's importance is |Δ| times the Kullback–Leibler
divergence of its row's softmax from the base's; what reaches median + 1.5 · (upper − lower
quartile) is taken over whole. mergekit estimates the quartiles of tensors above a million entries
from a random million; here they are exact for every size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..maths.lazy import TaskVectors, Tensor, passes, torch
from .base import MergeMethod, Site, Update
from .parts.trimming import magnitudes_at

_SMALL = 1e-8
_QUARTILES = (0.25, 0.5, 0.75)


@dataclass(frozen=True, kw_only=True)
class ArceeFusion(MergeMethod):
    """The changes of one model that matter most are taken over whole, the others dropped."""

    name: ClassVar[str] = "arcee_fusion"
    title: ClassVar[str] = "Arcee Fusion"
    paper: ClassVar[str] = "Arcee AI; mergekit"
    url: ClassVar[str] = "https://arcee.ai"
    models: ClassVar[tuple[int, int | None]] = (1, 1)
    in_pieces: ClassVar[bool] = False

    def merge(self, vectors: TaskVectors, site: Site) -> Update:
        """Return Δ where its importance reaches the threshold."""
        is_row = len(site.spec.shape) < 2
        m, n = vectors.shape

        def important(block: slice, stack: Tensor) -> Tensor:
            return importance(vectors.base(block), vectors.expert(0, block), is_row=is_row)

        def thrice(block: slice, stack: Tensor) -> list[Tensor]:
            return [important(block, stack)] * 3

        # The k-th smallest of d is the (d − k)-th largest.
        places = [m * n - int(q * (m * n - 1)) for q in _QUARTILES]
        found = magnitudes_at(vectors, places if m * n else [None] * 3, thrice)
        low, median, high = (x or 0.0 for x in found)
        threshold = median + 1.5 * (high - low)

        def rows(block: slice, stack: Tensor) -> Tensor:
            taken = passes.shrunk(important(block, stack), threshold).sign_()
            return taken.mul_(stack[0])

        return Update(rows, "arcee_fusion", {"threshold": threshold})


def importance(base: Tensor, expert: Tensor, *, is_row: bool) -> Tensor:
    """Return |W − W0| · KL(softmax W ‖ softmax W0) by rows; a vector (n, 1) is one row."""
    if is_row:
        return importance(base.T, expert.T, is_row=False).T.contiguous()
    p = torch.softmax(expert, dim=-1).add_(_SMALL)
    q = torch.softmax(base, dim=-1).add_(_SMALL)
    divergence = (p * torch.log(p / q)).sum(dim=-1, keepdim=True)
    # Rounding may leave less than nothing of rows that hardly differ.
    return (expert - base).abs_().mul_(divergence).clamp_min_(0)


METHOD = ArceeFusion
