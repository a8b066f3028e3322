"""Karcher mean: the mean of the models' directions on the sphere, for any number of them.

Karcher 1977; name, parameters and meaning are mergekit's ``karcher`` (0.1.5): whole weights, the
base one model among them, all with the same weight. The direction u solves Σ log_u(uᵢ) = 0 with
uᵢ = Wᵢ/‖Wᵢ‖, by the iteration u ← exp_u(mean log_u(uᵢ)); the length is the mean ‖Wᵢ‖. Everything
is a function of the inner products, so the iteration runs on N numbers. With ``around: base`` it
is the mean of the task vectors, as in releases before 1.0 (preset ``task_vectors``); ResMerge's
consensus direction is that one's chordal cousin, the normalised sum of the uᵢ.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from ..maths.lazy import TaskVectors, Tensor, torch
from .base import MergeMethod, Site, Update, param
from .parts.elementwise import cancelling, linear
from .parts.whole import of_weights, whole_gram


@dataclass(frozen=True, kw_only=True)
class Karcher(MergeMethod):
    """The models are averaged as directions on a sphere and get their mean length, so that
    disagreement does not shrink the result."""

    name: ClassVar[str] = "karcher"
    title: ClassVar[str] = "Karcher mean"
    paper: ClassVar[str] = "Karcher 1977; mergekit"
    url: ClassVar[str] = "https://arxiv.org/abs/2603.04972"
    weighted: ClassVar[bool] = True
    base: ClassVar[str] = "input"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "task_vectors": {"around": "base", "max_iter": 200, "tol": 1e-13},
    }
    earlier: ClassVar[Mapping[str, Any]] = {"around": "base", "max_iter": 200, "tol": 1e-13}
    in_pieces: ClassVar[bool] = False

    max_iter: int = param(10, "Steps at most", minimum=1, maximum=1000)
    tol: float = param(1e-5, "Angle at which to stop", minimum=0.0, maximum=1.0)
    around: str = param(
        "origin", "Average whole weights, or differences to the base", choices=("origin", "base")
    )
    scale: float = param(1.0, "Factor of the task vectors' mean", minimum=-10.0, maximum=10.0)

    def check_weights(self, weights: tuple[float, ...]) -> str | None:
        """Return a problem when the weights cancel where their sum divides."""
        return cancelling(weights, "take task_arithmetic") if self.around == "base" else None

    def entry_seconds(self) -> float:
        """Return what was measured (docs/performance.md)."""
        return 0.7e-9

    def merge(self, vectors: TaskVectors, site: Site) -> Update:
        """Return the Karcher mean's direction times the mean length."""
        if self.around == "base":
            a, warnings = self._coefficients(vectors.gram(), list(site.weights))
            return linear([self.scale * value for value in a], "karcher", warnings)
        gram = whole_gram(vectors)
        if vectors.is_zero():
            return linear([0.0] * vectors.count, "karcher")  # the mean of equals, exactly
        if site.base_weight is None:
            gram = gram[1:, 1:]
        # mergekit's takes no weights.
        a, warnings = self._coefficients(gram, [1.0] * len(gram))
        base = a.pop(0) if site.base_weight is not None else 0.0
        return of_weights(vectors, base, a, "karcher", warnings=warnings)

    def _coefficients(
        self, gram: Tensor, weights: list[float]
    ) -> tuple[list[float], tuple[str, ...]]:
        """Return the factor of each vector in the mean.

        Args:
            gram: inner products, float64, shape (N, N).
            weights: w, one a vector.
        """
        is_whole = self.around == "origin"
        lengths = gram.diagonal().clamp_min(0).sqrt()
        floor = self.tol if is_whole else 0.0
        alive = [i for i, length in enumerate(lengths.tolist()) if length > floor]
        a = [0.0] * len(weights)
        if not alive:
            return a, ()
        n = lengths[alive]
        w = n.new_tensor([weights[i] for i in alive])
        w = w / w.sum()
        C = gram[alive][:, alive] / n[:, None] / n[None, :]
        start = w.clone()
        if float(w @ C @ w) < max(self.tol**2, 1e-20):
            if not is_whole:
                cancelled = "the directions cancel: no Karcher mean, weighted mean used"
                return _placed(a, alive, w), (cancelled,)
            start = w.new_tensor([1.0] + [0.0] * (len(w) - 1))
        # mergekit divides by the number of all models, those of no length among them.
        length = float(lengths.mean()) if is_whole else float(w @ n)
        return _placed(a, alive, self._walk(C, w, start) / n * length), ()

    def _walk(self, C: Tensor, w: Tensor, c: Tensor) -> Tensor:
        """Return coefficients of u in the uᵢ.

        Args:
            C: cosines of the uᵢ, float64, shape (N, N).
            w: weights, summing to 1.
            c: of the start.
        """
        c = c / (c @ C @ c).clamp_min(1e-300).sqrt()
        for _ in range(self.max_iter):
            theta = (C @ c).clamp(-1.0, 1.0).acos()
            cosine = theta.cos()
            factor = w * torch.where(theta > 1e-8, theta / theta.sin().clamp_min(1e-300), 1.0)
            # log_u(uᵢ) = θ/sin θ · (uᵢ − cos θ · u)
            tangent = factor - float(factor @ cosine) * c
            length = float((tangent @ C @ tangent).clamp_min(0).sqrt())
            if length < self.tol:
                break
            step = torch.tensor(length, dtype=torch.float64)
            c = step.cos() * c + step.sin() / length * tangent
            c = c / (c @ C @ c).clamp_min(1e-300).sqrt()
        return c


def _placed(a: list[float], places: list[int], values: Tensor) -> list[float]:
    for i, value in zip(places, values.tolist(), strict=True):
        a[i] = value
    return a


METHOD = Karcher
