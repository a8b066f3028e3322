"""DARE, linear: drop entries of the task vectors at random, enlarge the rest, add.

Yu et al. 2024, https://arxiv.org/abs/2311.03099. Name, parameters and defaults are mergekit's
``dare_linear`` (0.1.5): density 1, which drops nothing; what is kept gets the L1 norm of the whole.
The paper divides by the density (preset ``paper``, with the ResMerge paper's density 0.2). Seeds
come from the tensor's name and the expert's position, so the result depends on nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from .parts.dare_method import Dropped


@dataclass(frozen=True, kw_only=True)
class DareLinear(Dropped):
    """Each expert keeps a random share of its changes, enlarged to make up for the rest; the
    results are added (or averaged)."""

    name: ClassVar[str] = "dare_linear"
    title: ClassVar[str] = "DARE"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": {"density": 0.2, "rescale": "inverse"},
    }


METHOD = DareLinear
