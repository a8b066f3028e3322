"""DELLA: drop small changes more often than large ones, enlarge the rest, elect signs, average.

Deep et al. 2024, https://arxiv.org/abs/2406.11617; name, parameters and defaults are mergekit's
``della`` (0.1.5): density 1, which drops nothing; what is kept gets the L1 norm of the whole.
The paper divides each kept entry by its probability (preset ``paper``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from .parts.della_method import MagnitudeDropped
from .parts.sparsified import normalize_param


@dataclass(frozen=True, kw_only=True)
class Della(MagnitudeDropped):
    """Each expert keeps a random share of its changes, of the large ones more, enlarged to make up
    for the rest; every weight then takes the mean of those that have the elected sign."""

    name: ClassVar[str] = "della"
    title: ClassVar[str] = "DELLA"
    elects: ClassVar[bool] = True
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": {"rescale": "inverse"},
    }

    normalize: bool = normalize_param(True)


METHOD = Della
