"""What post-training did to the weights: share changed in bf16, and the rank-1 head's energy."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from .model import WEIGHTS

# The families of ResMerge; embeddings and vectors have no head.
FAMILIES = {"attention": "self_attn", "ffn": "mlp"}


@dataclass(frozen=True, kw_only=True, slots=True)
class FamilyEnergy:
    """Energy of the task vector's rank-1 head, σ₁²/‖Δ‖², over the matrices of one family.

    Attributes:
        mean: unweighted mean.
        low: smallest.
        high: largest.
        matrices: how many matrices changed at all; only these are counted.
    """

    mean: float
    low: float
    high: float
    matrices: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Change:
    """How one expert differs from its base.

    Attributes:
        changed: share of the weights whose bf16 value differs, 0 to 1.
        changed_by_family: the same for "attention", "ffn" and "other".
        relative_norm: ‖Δ‖ / ‖W₀‖ over all weights.
        head_energy: per family.
    """

    changed: float
    changed_by_family: dict[str, float]
    relative_norm: float
    head_energy: dict[str, FamilyEnergy]

    def as_json(self) -> dict[str, Any]:
        """Return plain values, rounded to five digits."""
        return _rounded(asdict(self))


def measure_change(base_dir: Path, expert_dir: Path) -> Change:
    """Compare an expert's bf16 weights with its base's.

    Args:
        base_dir: checkpoint folder of the base.
        expert_dir: checkpoint folder of the expert, of the same shapes.
    """
    base = load_file(base_dir / WEIGHTS)
    expert = load_file(expert_dir / WEIGHTS)
    groups: dict[str, list[Tensor]] = {"attention": [], "ffn": [], "other": []}
    for name, weight in base.items():
        delta = expert[name].double() - weight.double()
        groups[_family(name, delta)].append(delta)
    everything = [delta for group in groups.values() for delta in group]
    return Change(
        changed=_share_changed(everything),
        changed_by_family={family: _share_changed(group) for family, group in groups.items()},
        relative_norm=_norm(everything) / _norm(weight.double() for weight in base.values()),
        head_energy={family: _head_energy(groups[family]) for family in FAMILIES},
    )


def _family(name: str, weight: Tensor) -> str:
    """Return "attention" or "ffn" for a matrix of theirs, else "other"."""
    if weight.ndim == 2:
        for family, mark in FAMILIES.items():
            if f".{mark}." in name:
                return family
    return "other"


def _share_changed(deltas: Sequence[Tensor]) -> float:
    # bf16 values subtract exactly in float64, so a delta is zero only where nothing changed.
    changed = sum(int(delta.count_nonzero()) for delta in deltas)
    return changed / sum(delta.numel() for delta in deltas)


def _norm(weights: Iterable[Tensor]) -> float:
    return sum(float(weight.square().sum()) for weight in weights) ** 0.5


def _head_energy(deltas: Sequence[Tensor]) -> FamilyEnergy:
    energies = [_largest(delta) / float(delta.square().sum()) for delta in deltas if delta.any()]
    if not energies:
        return FamilyEnergy(mean=0.0, low=0.0, high=0.0, matrices=0)
    mean = sum(energies) / len(energies)
    return FamilyEnergy(mean=mean, low=min(energies), high=max(energies), matrices=len(energies))


def _largest(delta: Tensor) -> float:
    """Return σ₁² by way of the smaller Gram matrix: exact enough for what is largest, and cheap."""
    smaller = delta if delta.shape[0] <= delta.shape[1] else delta.T
    return float(torch.linalg.eigvalsh(smaller @ smaller.T)[-1])


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return round(value, 5) if isinstance(value, float) else value
