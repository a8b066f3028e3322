"""Average: checkpoints of one run, weighted as if its learning rate had decayed over them.

A run at a constant rate that keeps checkpoints needs no decay: with w the decay over the window,
Σ cⱼ θⱼ with cⱼ = wⱼ − wⱼ₊₁ is what steps of rate w would have reached from the first checkpoint,
were the gradients the same (Tian et al. 2025, WSM, https://arxiv.org/abs/2507.17634). The points
at which w is read are those of Megatron-LM's tools/checkpoint/weighted_merge.py: wⱼ = w(j/N).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from ..maths.lazy import TaskVectors
from .base import MergeMethod, Site, Update, param
from .parts.whole import of_weights

# The decay of the learning rate, from 1 at the first checkpoint towards 0 behind the last.
_DECAYS: dict[str, Callable[[float], float]] = {
    "linear": lambda x: 1 - x,
    "cosine": lambda x: (1 + math.cos(math.pi * x)) / 2,
    "1-sqrt": lambda x: 1 - math.sqrt(x),
}


def coefficients(weights: str, count: int, decay: float = 0.9) -> list[float]:
    """Return the coefficient of each checkpoint, oldest first; they add up to 1.

    Args:
        weights: ``uniform``, a decay's name, or ``ema``.
        count: how many checkpoints there are, at least 1.
        decay: of ``ema``, the exponential moving average: what each later checkpoint leaves of it.
    """
    if weights == "uniform":
        return [1 / count] * count
    if weights == "ema":
        of_first = [decay ** (count - 1)]
        return of_first + [(1 - decay) * decay ** (count - 1 - j) for j in range(1, count)]
    rates = [_DECAYS[weights](j / count) for j in range(count)]
    return [rate - after for rate, after in itertools.pairwise([*rates, 0.0])]


@dataclass(frozen=True, kw_only=True)
class Average(MergeMethod):
    """Checkpoints of one run, oldest first, as if its learning rate had decayed over them."""

    name: ClassVar[str] = "average"
    title: ClassVar[str] = "Average of checkpoints"
    paper: ClassVar[str] = "Tian et al. 2025, WSM"
    url: ClassVar[str] = "https://arxiv.org/abs/2507.17634"
    low_rank: ClassVar[bool] = True
    base: ClassVar[str] = "input"

    weights: str = param(
        "uniform",
        "The decay to emulate; of checkpoints at equal distances, linear is uniform",
        choices=("uniform", *_DECAYS, "ema"),
    )
    decay: float = param(
        0.9, "Of ema: what each later checkpoint leaves of the average", minimum=0.0, maximum=1.0
    )
    last: int = param(0, "Only the last so many checkpoints; 0 takes all", minimum=0, maximum=1000)
    window: str = param("", "Only checkpoints of steps FIRST:LAST, where a pattern names them")

    def merge(self, vectors: TaskVectors, site: Site) -> Update:
        """Return Σ cⱼ θⱼ, less the first model's θ."""
        of_first = [] if site.base_weight is None else [site.base_weight]
        all_of = coefficients(self.weights, len(of_first) + len(site.weights), self.decay)
        return of_weights(vectors, None, all_of[len(of_first) :], "average")


METHOD = Average
