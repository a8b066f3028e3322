"""The cast to the output dtype: nearest or stochastic, and how much of the update it kept."""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from .passes import dsdot


@dataclass(slots=True)
class Kept:
    """Running sums over row blocks of what a cast kept of an update.

    With ΔW the float32 update and K = cast(W0 + ΔW) − W0 what is left of it in the output:
    """

    update_sq: float = 0.0
    kept_sq: float = 0.0
    inner: float = 0.0
    changed: int = 0
    numel: int = 0
    overflowed: bool = field(default=False)

    def add(self, update: Tensor, kept: Tensor) -> None:
        """Add one block: ΔW and K, float32, same shape."""
        if kept.device.type == "cpu":
            # torch counts nonzero floats fifteen times slower.
            changed = int(np.count_nonzero(kept.numpy() != 0))
        else:
            changed = int(torch.count_nonzero(kept))
        products = [dsdot(update, update), dsdot(update, kept), dsdot(kept, kept)]
        self.add_sums([*products, changed], kept.numel())

    def add_sums(self, sums: Sequence[float], numel: int) -> None:
        """Add one block: ‖ΔW‖², ⟨ΔW, K⟩, ‖K‖², the number of nonzero K; and of how many values."""
        update_sq, product, kept_sq, changed = sums
        self.update_sq += update_sq
        self.inner += product
        self.kept_sq += kept_sq
        self.changed += int(changed)
        self.numel += numel
        self.overflowed |= not math.isfinite(kept_sq)

    def absorb(self, other: "Kept") -> None:
        """Add the sums of other blocks of the same tensor."""
        self.update_sq += other.update_sq
        self.kept_sq += other.kept_sq
        self.inner += other.inner
        self.changed += other.changed
        self.numel += other.numel
        self.overflowed |= other.overflowed

    @property
    def update_norm(self) -> float:
        """‖ΔW‖."""
        return math.sqrt(self.update_sq)

    @property
    def kept_norm(self) -> float | None:
        """‖K‖ / ‖ΔW‖, or None for a zero update."""
        return math.sqrt(self.kept_sq / self.update_sq) if self.update_sq > 0 else None

    @property
    def kept_cosine(self) -> float | None:
        """cos(K, ΔW), 0 when nothing was kept, or None for a zero update."""
        if self.update_sq <= 0:
            return None
        if self.kept_sq <= 0:
            return 0.0
        return self.inner / math.sqrt(self.update_sq * self.kept_sq)

    @property
    def changed_fraction(self) -> float:
        """Share of elements that differ from the base's, in [0, 1]."""
        return self.changed / self.numel if self.numel else 0.0


def block_seed(seed: int, name: str, start_row: int) -> int:
    """Return a seed that depends on the user's seed, the tensor and the block, on nothing else."""
    key = f"{seed}\x00{name}\x00{start_row}".encode()
    return int.from_bytes(hashlib.sha256(key).digest()[:7], "little")


def cast(weights: Tensor, dtype: torch.dtype, *, seed: int | None = None) -> Tensor:
    """Return weights in another dtype, rounded once.

    Args:
        weights: float32, any shape.
        dtype: the output dtype.
        seed: None rounds to nearest, ties to even. A seed rounds up or down at random with
            probabilities that make the expected value exact (unbiased); ours, no source.

    Returns:
        Same shape, on the same device.
    """
    nearest = weights.to(dtype)
    if seed is None or dtype in (torch.float32, torch.float64):
        return nearest
    generator = torch.Generator().manual_seed(seed)
    draw = torch.rand(weights.shape, generator=generator, dtype=torch.float32).to(weights.device)
    error = weights - nearest.float()
    other = _neighbour(nearest, towards_larger=error > 0)
    step = (other.float() - nearest.float()).abs()
    take_other = (error != 0) & (draw * step < error.abs()) & torch.isfinite(other.float())
    return torch.where(take_other, other, nearest)


def _neighbour(values: Tensor, *, towards_larger: Tensor) -> Tensor:
    """Return the next representable 16-bit float in a direction; zero steps to a subnormal."""
    bits = values.view(torch.int16).to(torch.int32)
    magnitude, negative = bits & 0x7FFF, bits < 0
    away = towards_larger != negative
    moved = torch.where(away, magnitude + 1, magnitude - 1)
    crosses = moved < 0
    moved = torch.where(crosses, torch.ones_like(moved), moved)
    negative = torch.where(crosses, ~towards_larger, negative)
    signed = torch.where(negative, moved | -0x8000, moved)
    return signed.to(torch.int16).view(values.dtype)
