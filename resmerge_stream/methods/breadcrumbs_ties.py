"""Model breadcrumbs + TIES: drop the largest and the smallest changes, elect signs, add.

Davari and Belilovsky 2023, https://arxiv.org/abs/2312.06795; name, parameters and defaults are
mergekit's ``breadcrumbs_ties`` (0.1.5). At the default density of 1 nothing is dropped, γ or not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .parts.breadcrumbs_method import Trimmed


@dataclass(frozen=True, kw_only=True)
class BreadcrumbsTies(Trimmed):
    """Each expert loses its largest and its smallest changes; every weight then takes the sum of
    those that have the sign with more total weight."""

    name: ClassVar[str] = "breadcrumbs_ties"
    title: ClassVar[str] = "Breadcrumbs + TIES"
    elects: ClassVar[bool] = True


METHOD = BreadcrumbsTies
