"""Passthrough: one model, its weights times a factor.

Name, parameters and defaults are mergekit's ``passthrough`` (0.1.5), for whole models: stacking
layers of several models stays with mergekit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ..specs import TensorSpec
from .base import MergeMethod, Rule, Site, Update, default_role
from .parts.whole import of_weights

if TYPE_CHECKING:
    from ..maths.task_vectors import TaskVectors


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

    def rule_for(self, spec: TensorSpec, experts: int) -> Rule:
        """Return the one rule for every tensor."""
        return Rule("passthrough", default_role(spec))

    def merge(self, vectors: TaskVectors, site: Site) -> Update:
        """Return scale · W less W."""
        scale = 1.0 if site.base_weight is None else site.base_weight
        return of_weights(vectors, scale, [0.0] * vectors.count, "passthrough")


METHOD = Passthrough
