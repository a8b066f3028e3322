"""SLERP of the base and one model: walk the arc between their weights instead of the chord.

Shoemake 1985; name, parameter and meaning are mergekit's ``slerp`` (0.1.5), tensor by tensor:
[sin((1−t)θ)·W0 + sin(tθ)·W1] / sin θ with θ the angle between whole weights; where they are nearly
parallel (|cos| > 0.9995) the line between them. Releases before 1.0 meant by it the arc between two
experts' task vectors (WARP, Ramé et al. 2024): that is `nuslerp` with a base.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from ..maths.lazy import TaskVectors
from .base import MergeMethod, Site, Update, param
from .parts.whole import of_weights, whole_gram

_NEARLY_PARALLEL = 0.9995
_NO_LENGTH = 1e-8


@dataclass(frozen=True, kw_only=True)
class Slerp(MergeMethod):
    """Every tensor lies on the arc between the base's and one model's, which keeps its length where
    a mean would shrink it."""

    name: ClassVar[str] = "slerp"
    title: ClassVar[str] = "SLERP (base and one model)"
    paper: ClassVar[str] = "Shoemake 1985; mergekit"
    url: ClassVar[str] = "https://en.wikipedia.org/wiki/Slerp"
    models: ClassVar[tuple[int, int | None]] = (1, 1)
    in_pieces: ClassVar[bool] = False

    t: float = param(0.5, "Where between base (0) and model (1)", minimum=0.0, maximum=1.0)

    def merge(self, vectors: TaskVectors, site: Site) -> Update:
        """Return a·W0 + b·W1 less W0, with a and b from the angle between them."""
        gram = whole_gram(vectors)
        lengths = [math.sqrt(max(float(x), 0.0)) for x in gram.diagonal()]
        lengths = [length if length > _NO_LENGTH else 1.0 for length in lengths]
        cosine = min(max(float(gram[0, 1]) / lengths[0] / lengths[1], -1.0), 1.0)
        if abs(cosine) > _NEARLY_PARALLEL:
            return of_weights(vectors, None, [self.t], "slerp", {"cosine": cosine})
        theta = math.acos(cosine)
        a = math.sin((1 - self.t) * theta) / math.sin(theta)
        b = math.sin(self.t * theta) / math.sin(theta)
        return of_weights(vectors, a, [b], "slerp", {"cosine": cosine})


METHOD = Slerp
