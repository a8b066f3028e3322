"""Passthrough: one model, its weights times a factor; or a base with an adapter put into it.

Name, parameters and defaults are mergekit's ``passthrough`` (0.1.5), for whole models: stacking
layers of several models stays with mergekit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..maths.lazy import TaskVectors
from .base import MergeMethod, Site, Update
from .parts.whole import of_weights


@dataclass(frozen=True, kw_only=True)
class Passthrough(MergeMethod):
    """One model's weights, times a factor for layers or modules where the recipe has one."""

    name: ClassVar[str] = "passthrough"
    title: ClassVar[str] = "Passthrough"
    paper: ClassVar[str] = "mergekit"
    url: ClassVar[str] = "https://github.com/arcee-ai/mergekit"
    weighted: ClassVar[bool] = True
    weight_key: ClassVar[str] = "scale"
    base: ClassVar[str] = "input"
    models: ClassVar[tuple[int, int | None]] = (0, 0)

    def merge(self, vectors: TaskVectors, site: Site) -> Update:
        """Return scale · W, less what the layout's model has: W itself, or an adapter's base."""
        return of_weights(vectors, site.base_weight or 0.0, site.weights, "passthrough")


METHOD = Passthrough
