"""TIES: trim small changes, elect a sign for every weight, average what agrees with it.

Yadav et al. 2023, https://arxiv.org/abs/2306.01708. Name, parameters and defaults are mergekit's
``ties`` (0.1.5): density 1, which trims nothing; each tensor ranked by itself. The paper keeps 20 %
of the whole model (preset ``paper``: exact here, by two counting passes), and so do
prateeky2806/ties-merging and MergeBench; MergeLLM ranks each tensor (``mergellm``); fusion_bench
adds instead of averaging, λ = 0.3 (``fusion_bench``). Entries equal to the threshold are all kept,
as in the original; mergekit cuts them in the order of a sort.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from .base import Counter, Site, param
from .parts.sparsified import Sparse, Thinned, normalize_param

if TYPE_CHECKING:
    from torch import Tensor

    from ..maths.task_vectors import TaskVectors


@dataclass(frozen=True, kw_only=True)
class Ties(Thinned):
    """Of each expert's changes the largest are kept; every weight then takes the mean of those
    that have the sign with more total weight."""

    name: ClassVar[str] = "ties"
    title: ClassVar[str] = "TIES"
    paper: ClassVar[str] = "Yadav et al. 2023, TIES-Merging"
    url: ClassVar[str] = "https://arxiv.org/abs/2306.01708"
    elects: ClassVar[bool] = True
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": {"density": 0.2, "trim": "model", "normalize": True},
        "mergellm": {"density": 0.2, "trim": "tensor", "normalize": True},
        "fusion_bench": {"density": 0.2, "trim": "model", "normalize": False, "lambda": 0.3},
    }
    earlier: ClassVar[Mapping[str, Any]] = {"density": 0.2, "trim": "model"}

    normalize: bool = normalize_param(True)
    trim: str = param("tensor", "Rank entries in each tensor or all", choices=("tensor", "model"))

    def is_local(self) -> bool:
        """Return whether the thresholds are known before a tensor is read."""
        return self.trim == "model"

    def counting_passes(self) -> int:
        """Return 2 for thresholds of the whole model."""
        return 2 if self.trim == "model" and not self.dense() else 0

    def counter(self, number: int, counted: Mapping[str, Any], experts: int) -> Counter:
        """Return the counter of |Δ| over all tensors."""
        from .parts.trimming import ModelThresholds

        return ModelThresholds(number, counted, experts, self.density)

    def sparse(self, vectors: TaskVectors, site: Site) -> tuple[Sparse, Mapping[str, Any]]:
        """Return the trimmed task vectors."""
        import torch

        from ..maths.passes import shrunk
        from .parts.trimming import tensor_thresholds

        gates: dict[str, Any] = {}
        if self.trim == "model":
            thresholds = [site.counted["trim_thresholds"][i] for i in site.experts]
        else:
            thresholds = tensor_thresholds(vectors, self.density)
            gates = {"trim_thresholds": thresholds}

        def trimmed(block: slice, stack: Tensor) -> Tensor:
            kept = torch.empty_like(stack)
            for delta, tau, out in zip(stack, thresholds, kept, strict=True):
                shrunk(delta, tau, out)
            return kept

        return trimmed, gates


METHOD = Ties
