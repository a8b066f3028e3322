"""Karcher mean: the mean of the task vectors' directions on the sphere, for any number of experts.

Karcher 1977; public code mergekit ``karcher`` (on whole weights; here on the differences to the
base, tensor by tensor). The direction u solves Σ wᵢ log_u(uᵢ) = 0 with uᵢ = Δᵢ/‖Δᵢ‖, by the
iteration u ← exp_u(Σ wᵢ log_u(uᵢ)); the length is Σ wᵢ‖Δᵢ‖. Everything is a function of the Gram
matrix, so the iteration runs on N numbers and goes on to convergence (mergekit: 10 steps, 1e-5).
For two experts it is SLERP's direction at t = w₂. ResMerge's consensus direction is its chordal
cousin: the normalised sum of the uᵢ.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ..specs import TensorSpec
from .base import MergeMethod, Rule, Site, Update, default_role, param
from .parts.elementwise import cancelling, linear

if TYPE_CHECKING:
    from torch import Tensor

    from ..maths.task_vectors import TaskVectors

_STEPS = 200
_TOLERANCE = 1e-13


@dataclass(frozen=True, kw_only=True)
class Karcher(MergeMethod):
    """The experts' changes are averaged as directions on a sphere and get their mean length, so
    that disagreement does not shrink the result."""

    name: ClassVar[str] = "karcher"
    title: ClassVar[str] = "Karcher mean"
    paper: ClassVar[str] = "Karcher 1977; mergekit"
    url: ClassVar[str] = "https://github.com/arcee-ai/mergekit"
    weighted: ClassVar[bool] = True

    scale: float = param(1.0, "Factor of the result", minimum=-10.0, maximum=10.0)

    def check_weights(self, weights: tuple[float, ...]) -> str | None:
        """Return a problem when the weights cancel where their sum divides."""
        return cancelling(weights)

    def rule_for(self, spec: TensorSpec, experts: int) -> Rule:
        """Return the one rule; directions are those of whole tensors."""
        return Rule("karcher", default_role(spec), in_pieces=False)

    def merge(self, vectors: TaskVectors, site: Site) -> Update:
        """Return Σ aᵢ Δᵢ, the Karcher mean's direction times the mean length."""
        D = vectors.gram()
        norms = D.diagonal().clamp_min(0).sqrt()
        changed = [i for i, norm in enumerate(norms.tolist()) if norm > 0]
        a = [0.0] * vectors.count
        if not changed:
            return linear(a, "karcher")
        n = norms[changed]
        w = n.new_tensor([site.weights[i] for i in changed])
        w = w / w.sum()
        c = _direction(D[changed][:, changed] / n[:, None] / n[None, :], w)
        warnings: tuple[str, ...] = ()
        if c is None:
            warnings = ("the directions cancel: no Karcher mean, weighted mean used",)
            coefficients = w
        else:
            coefficients = c / n * float(w @ n)
        for i, value in zip(changed, coefficients.tolist(), strict=True):
            a[i] = self.scale * value
        return linear(a, "karcher", warnings)


def _direction(C: Tensor, w: Tensor) -> Tensor | None:
    """Return coefficients of u in the uᵢ, or None where the start is undefined.

    Args:
        C: cosines of the uᵢ, float64, shape (N, N).
        w: weights, summing to 1.
    """
    import torch

    c = w.clone()
    if float(c @ C @ c) < 1e-20:
        return None
    for _ in range(_STEPS):
        c = c / (c @ C @ c).clamp_min(1e-300).sqrt()
        cosine = (C @ c).clamp(-1.0, 1.0)
        theta = cosine.acos()
        factor = w * torch.where(theta > 1e-8, theta / theta.sin().clamp_min(1e-300), 1.0)
        # log_u(uᵢ) = θ/sin θ · (uᵢ − cos θ · u)
        tangent = factor - float(factor @ cosine) * c
        length = float((tangent @ C @ tangent).clamp_min(0).sqrt())
        if length < _TOLERANCE:
            break
        step = torch.tensor(length, dtype=torch.float64)
        c = step.cos() * c + step.sin() / length * tangent
    return c


METHOD = Karcher
