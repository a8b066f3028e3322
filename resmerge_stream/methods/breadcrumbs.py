"""Model breadcrumbs: drop the largest and the smallest changes, add the rest.

Davari and Belilovsky 2023, https://arxiv.org/abs/2312.06795; name, parameters and defaults are
mergekit's ``breadcrumbs`` (0.1.5). At the default density of 1 nothing is dropped, γ or not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .parts.breadcrumbs_method import Trimmed


@dataclass(frozen=True, kw_only=True)
class Breadcrumbs(Trimmed):
    """Each expert loses its largest and its smallest changes; what is left is added."""

    name: ClassVar[str] = "breadcrumbs"
    title: ClassVar[str] = "Breadcrumbs"


METHOD = Breadcrumbs
