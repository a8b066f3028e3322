"""NuSLERP: the arc between two models, or between their task vectors where there is a base.

mergekit ``nuslerp`` (0.1.5): t = w₂ / (w₁ + w₂); one angle for the tensor (`nuslerp_flatten`), or
one for each row, or each column (`nuslerp_row_wise`, in mergekit's words). Nearly parallel vectors
are interpolated along the line. With a base it is WARP's rule (Ramé et al. 2024, 2406.16768).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..maths.lazy import TaskVectors, Tensor, torch
from ..specs import TensorSpec
from .base import MergeMethod, Rule, Site, Update, default_role, param
from .parts.elementwise import linear
from .parts.whole import of_weights, whole_gram

_NO_WEIGHT = 1e-6
_NO_LENGTH = 1e-7
_PARALLEL = 1e-16


@dataclass(frozen=True, kw_only=True)
class NuSlerp(MergeMethod):
    """Two models (or their changes, where there is a base) are interpolated along the arc between
    their directions, which keeps their length where a mean would shrink it."""

    name: ClassVar[str] = "nuslerp"
    title: ClassVar[str] = "NuSLERP (two models)"
    paper: ClassVar[str] = "mergekit; Shoemake 1985"
    url: ClassVar[str] = "https://github.com/arcee-ai/mergekit"
    weighted: ClassVar[bool] = True
    base: ClassVar[str] = "optional"
    models: ClassVar[tuple[int, int | None]] = (2, 2)

    nuslerp_flatten: bool = param(True, "One angle for the tensor")
    nuslerp_row_wise: bool = param(False, "An angle for each column instead of each row")

    def rule_for(self, spec: TensorSpec, experts: int) -> Rule:
        """Return the one rule; only angles of rows need no other row."""
        by_row = not (self._is_flat(spec) or self.nuslerp_row_wise)
        return Rule("nuslerp", default_role(spec), in_pieces=by_row)

    def merge(self, vectors: TaskVectors, site: Site) -> Update:
        """Return the interpolated weights less W0, or the interpolated change."""
        is_whole = site.base_weight is not None
        weights = [*([site.base_weight] if is_whole else []), *site.weights]
        first, second = (1.0 if weight is None else weight for weight in weights)
        t = 0.5 if abs(first + second) < _NO_WEIGHT else second / (first + second)
        if self._is_flat(site.spec):
            products = whole_gram(vectors) if is_whole else vectors.gram()
            a, b = (float(x) for x in arc(products, t))
            if is_whole:
                return of_weights(vectors, a, [b], "nuslerp")
            return linear([a, b], "nuslerp")
        columns = _column_products(vectors, is_whole) if self.nuslerp_row_wise else None

        def rows(block: slice, stack: Tensor) -> Tensor:
            pair = _pair(vectors, block, stack, is_whole)
            products = _products(pair, axis=1) if columns is None else columns
            a, b = arc(products, t)
            a, b = (a[:, None], b[:, None]) if columns is None else (a[None], b[None])
            merged = pair[0] * a.float() + pair[1] * b.float()
            return merged.sub_(pair[0]) if is_whole else merged

        return Update(rows, "nuslerp", moves_base=is_whole)

    def _is_flat(self, spec: TensorSpec) -> bool:
        return self.nuslerp_flatten or len(spec.shape) < 2


def _pair(vectors: TaskVectors, block: slice, stack: Tensor, is_whole: bool) -> Tensor:
    """Return the two things to interpolate, shape (2, b, n)."""
    if not is_whole:
        return stack
    base = vectors.base(block)
    return torch.stack([base, base + stack[0]])


def _products(pair: Tensor, axis: int) -> Tensor:
    """Return the inner products of two stacks along an axis, float64, shape (lines, 2, 2)."""
    double = pair.double()
    return torch.einsum("ibn,jbn->bij" if axis == 1 else "ibn,jbn->nij", double, double)


def _column_products(vectors: TaskVectors, is_whole: bool) -> Tensor:
    total = torch.zeros(vectors.shape[1], 2, 2, dtype=torch.float64, device=vectors.device)
    for block in vectors.blocks():
        total += _products(_pair(vectors, block, vectors.stack(block), is_whole), axis=0)
    return total


def arc(products: Tensor, t: float) -> tuple[Tensor, Tensor]:
    """Return the factors of the first and the second, from their inner products (…, 2, 2)."""
    lengths = products.diagonal(dim1=-2, dim2=-1).clamp_min(0).sqrt().clamp_min(_NO_LENGTH)
    cosine = (products[..., 0, 1] / lengths[..., 0] / lengths[..., 1]).clamp(-1.0, 1.0)
    parallel = 1 - cosine.square() <= _PARALLEL
    theta = torch.acos(torch.where(parallel, 0.0, cosine))
    a = torch.where(parallel, 1 - t, torch.sin((1 - t) * theta) / torch.sin(theta))
    b = torch.where(parallel, t, torch.sin(t * theta) / torch.sin(theta))
    return a, b


METHOD = NuSlerp
