"""SLERP of two task vectors: walk the arc between them instead of the chord.

Shoemake 1985; as in WARP (Ramé et al. 2024, https://arxiv.org/abs/2406.16768), on the differences
to the base, tensor by tensor: [sin((1−t)θ)·Δ₁ + sin(tθ)·Δ₂] / sin θ. Public code: mergekit
``slerp``, MergeLLM, fusion_bench; those interpolate whole weights, where the cosine of two experts
of one base is close to 1 and the rule falls back to the weighted mean (|cos| > 0.9995, kept here).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from ..specs import TensorSpec
from .base import MergeMethod, Rule, Site, Update, default_role, param
from .parts.elementwise import linear

if TYPE_CHECKING:
    from ..maths.task_vectors import TaskVectors

_NEARLY_PARALLEL = 0.9995


@dataclass(frozen=True, kw_only=True)
class Slerp(MergeMethod):
    """Two experts' changes are interpolated along the arc between their directions, which keeps
    their length where a mean would shrink it."""

    name: ClassVar[str] = "slerp"
    title: ClassVar[str] = "SLERP (two experts)"
    paper: ClassVar[str] = "Ramé et al. 2024, WARP; Shoemake 1985"
    url: ClassVar[str] = "https://arxiv.org/abs/2406.16768"

    t: float = param(
        0.5, "Where between the first (0) and the second (1)", minimum=0.0, maximum=1.0
    )
    scale: float = param(1.0, "Factor η of the result", minimum=-10.0, maximum=10.0)

    def check_weights(self, weights: tuple[float, ...]) -> str | None:
        """Refuse anything but two experts."""
        if len(weights) == 2:
            return None
        return f"slerp merges exactly 2 experts, not {len(weights)}. Use karcher for any number."

    def rule_for(self, spec: TensorSpec, experts: int) -> Rule:
        """Return the one rule; the angle is that of whole tensors."""
        return Rule("slerp", default_role(spec), in_pieces=False)

    def merge(self, vectors: TaskVectors, site: Site) -> Update:
        """Return a₁Δ₁ + a₂Δ₂ with a from the angle between them."""
        D = vectors.gram()
        norms = math.sqrt(float(D[0, 0]) * float(D[1, 1]))
        cosine = min(max(float(D[0, 1]) / norms, -1.0), 1.0) if norms > 0 else 1.0
        a = (1 - self.t, self.t)
        if abs(cosine) <= _NEARLY_PARALLEL:
            theta = math.acos(cosine)
            a = (math.sin((1 - self.t) * theta), math.sin(self.t * theta))
            a = (a[0] / math.sin(theta), a[1] / math.sin(theta))
        update = linear([self.scale * x for x in a], "slerp")
        return replace(update, gates={"cosine": cosine if norms > 0 else None})


METHOD = Slerp
