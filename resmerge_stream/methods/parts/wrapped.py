"""What the methods share that change another method's result. Not a method itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from ...recipe import parse_method
from ...specs import TensorSpec
from ..base import Counter, MergeMethod, Rule, Site, param


@dataclass(frozen=True, kw_only=True)
class Wrapped(MergeMethod):
    """A method that changes what the method `inner` decides.

    `inner` is a method's name, with parameters behind colons: ``ties:trim=tensor:density=0.1``.
    """

    inner: str = param("task_arithmetic", "The method to change, NAME:KEY=VALUE:…")
    default_inner: ClassVar[str] = "task_arithmetic"

    def __post_init__(self) -> None:
        _ = self.wrapped  # a wrong name or parameter is refused here

    @property
    def wrapped(self) -> MergeMethod:
        """The inner method.

        Raises:
            RecipeError: there is no such method, or no such parameter.
        """
        from .. import build_method

        return build_method(*parse_method(self.inner))

    def check_weights(self, weights: tuple[float, ...]) -> str | None:
        """Refuse what the inner method refuses."""
        return self.wrapped.check_weights(weights)

    def rule_for(self, spec: TensorSpec, experts: int) -> Rule:
        """Return the inner method's rule under this method's name."""
        return replace(self.wrapped.rule_for(spec, experts), name=self.name)

    def counting_passes(self) -> int:
        """Return the inner method's."""
        return self.wrapped.counting_passes()

    def counter(self, number: int, counted: Mapping[str, Any], experts: int) -> Counter:
        """Return the inner method's."""
        return self.wrapped.counter(number, counted, experts)

    def entry_seconds(self) -> float:
        """Return the inner method's."""
        return self.wrapped.entry_seconds()

    def scratch_bytes(self, m: int, n: int, experts: int) -> int:
        """Return the inner method's."""
        return self.wrapped.scratch_bytes(m, n, experts)

    def kept_bytes(self, spec: TensorSpec, rule: Rule, experts: int) -> int:
        """Return the inner method's."""
        return self.wrapped.kept_bytes(spec, rule, experts)

    def inner_site(self, site: Site) -> Site:
        """Return the site as the inner method expects it."""
        return replace(site, rule=self.wrapped.rule_for(site.spec, len(site.weights)))
