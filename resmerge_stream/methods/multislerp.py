"""Multi-SLERP: the weighted mean of directions on a sphere, by one step in a tangent space.

mergekit ``multislerp`` (0.1.5), after https://goddard.blog/posts/multislerp-wow-what-a-cool-idea:
of the models, or of their task vectors where there is a base. Everything is a function of the inner
products of the vectors, so one pass over them decides. Directions whose weighted sum is zero have
no mean: the weighted sum is taken (mergekit does so for two, and stops for more).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from ..maths.lazy import TaskVectors, Tensor
from .base import MergeMethod, Site, Update, param
from .parts.elementwise import cancelling, linear
from .parts.whole import of_weights, whole_gram


@dataclass(frozen=True, kw_only=True)
class MultiSlerp(MergeMethod):
    """The models (or their changes, where there is a base) are averaged as directions on a sphere
    and get their mean length, so that disagreement does not shrink the result."""

    name: ClassVar[str] = "multislerp"
    title: ClassVar[str] = "Multi-SLERP"
    paper: ClassVar[str] = "Goddard 2025; mergekit"
    url: ClassVar[str] = "https://goddard.blog/posts/multislerp-wow-what-a-cool-idea"
    weighted: ClassVar[bool] = True
    base: ClassVar[str] = "optional"
    in_pieces: ClassVar[bool] = False

    normalize_weights: bool = param(True, "Divide the weights by their sum")
    eps: float = param(1e-8, "Lengths below count as none", minimum=0.0, maximum=1.0)

    def check_weights(self, weights: tuple[float, ...]) -> str | None:
        """Return a problem when the weights cancel where their sum divides."""
        return (
            cancelling(weights, "set normalize_weights: false") if self.normalize_weights else None
        )

    def merge(self, vectors: TaskVectors, site: Site) -> Update:
        """Return the mean on the sphere, less W0 where models are averaged."""
        if site.base_weight is None:
            a, warnings = self._coefficients(vectors.gram(), list(site.weights))
            return linear(a, "multislerp", warnings)
        weights = [site.base_weight, *site.weights]
        a, warnings = self._coefficients(whole_gram(vectors), weights)
        return of_weights(vectors, a[0], a[1:], "multislerp", warnings=warnings)

    def _coefficients(
        self, gram: Tensor, weights: list[float]
    ) -> tuple[list[float], tuple[str, ...]]:
        """Return the factor of each vector in the mean.

        Args:
            gram: inner products, float64, shape (N, N).
            weights: w, one a vector.
        """
        if len(weights) == 1:
            return [1.0], ()
        w = gram.new_tensor(weights)
        w = w / w.sum() if self.normalize_weights else w
        lengths = gram.diagonal().clamp_min(0).sqrt()
        scale = 1 / (lengths + self.eps)
        units = gram * scale[:, None] * scale[None, :]
        # The mean of the directions, as coefficients of them.
        mean_length = math.sqrt(max(float(w @ units @ w), 0.0))
        if mean_length < self.eps:
            return w.tolist(), ("the directions cancel: no mean on the sphere, sum used",)
        mean = w / mean_length
        along = units @ mean
        tangent = w - float(w @ along) * mean
        turn = math.sqrt(max(float(tangent @ units @ tangent), 0.0)) + self.eps
        result = math.cos(turn) * mean + math.sin(turn) / turn * tangent
        factors = result * float(w @ lengths) * scale
        return factors.tolist(), ()


METHOD = MultiSlerp
