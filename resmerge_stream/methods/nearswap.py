"""NearSwap: take a model's weight where it is near the base's, less of it the farther it is.

mergekit ``nearswap`` (0.1.5), after alchemonaut's QuartetAnemoi-70B: W0 + min(t / |Δ|, 1) · Δ, that
is: no weight moves by more than t.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..maths.lazy import TaskVectors, Tensor
from .base import MergeMethod, Site, Update, param

_NO_DIFFERENCE = 1e-6


@dataclass(frozen=True, kw_only=True)
class NearSwap(MergeMethod):
    """Every weight goes towards the model's, by t at most."""

    name: ClassVar[str] = "nearswap"
    title: ClassVar[str] = "NearSwap"
    paper: ClassVar[str] = "alchemonaut 2024; mergekit"
    url: ClassVar[str] = "https://huggingface.co/alchemonaut/QuartetAnemoi-70B-t0.0001"
    models: ClassVar[tuple[int, int | None]] = (1, 1)

    t: float = param(0.001, "How far a weight may move", minimum=0.0, maximum=10.0)

    def merge(self, vectors: TaskVectors, site: Site) -> Update:
        """Return min(t / max(|Δ|, 1e-6), 1) · Δ."""

        def rows(block: slice, stack: Tensor) -> Tensor:
            share = stack[0].abs().clamp_min_(_NO_DIFFERENCE).reciprocal_().mul_(self.t)
            return share.clamp_(0.0, 1.0).mul_(stack[0])

        return Update(rows, "nearswap")


METHOD = NearSwap
