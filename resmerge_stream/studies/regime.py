"""What kind of group some experts are, by their weights: cosines, lengths, overlap, rounding."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..maths.rounding import Kept, cast
from ..planning.plan import PlannedTensor
from ..roles import layer_of

# From the lowest bar up: which one number makes a group something else than orthogonal.
_COPIES, _OPPOSED, _OVERLAPPING, _UNEQUAL, _SPARSE = 0.9, -0.2, 0.2, 3.0, 0.1
KINDS = {
    "copies": "nearly the same update",
    "opposed": "some updates point against each other",
    "overlapping": "some updates point the same way",
    "long": "one update is much longer than every other",
    "short": "some updates are much shorter than the longest",
    "sparse": "each update changes few of the weights",
    "orthogonal": "unrelated updates of similar length",
    "single": "fewer than two experts changed anything",
}


@dataclass(frozen=True, slots=True)
class Regime:
    """What the weights of N experts say of them as a group.

    Attributes:
        kind: one of `KINDS`.
        cosines: of each pair's updates, (0, 1), (0, 2), …; those of unchanged experts left out.
        lengths: ‖Δ_i‖ of each expert.
        changed: share of the weights that each expert changed, 0 to 1.
        overlap: of the weights that the sparser of two experts changed, the share that the other
            changed too; the mean over pairs.
        kept_norm, kept_cosine: what the cast to the output's type leaves of the mean of the
            updates; None where that is zero.
        share: of the weights that were read, 0 to 1.
    """

    kind: str
    cosines: tuple[float, ...]
    lengths: tuple[float, ...]
    changed: tuple[float, ...]
    overlap: float | None
    kept_norm: float | None
    kept_cosine: float | None
    share: float = 1.0

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return asdict(self)


@dataclass(slots=True)
class Pairs:
    """Running sums over row blocks of N experts' updates.

    Attributes:
        count: N.
        gram: ⟨Δ_i, Δ_j⟩, float64.
        both: how many weights both experts changed.
        numel: weights seen.
        kept: of the mean of the updates.
    """

    count: int
    gram: Tensor = field(init=False)
    both: Tensor = field(init=False)
    numel: int = 0
    kept: Kept = field(default_factory=Kept)

    def __post_init__(self) -> None:
        self.gram = torch.zeros(self.count, self.count, dtype=torch.float64)
        self.both = torch.zeros(self.count, self.count, dtype=torch.float64)

    def add_block(self, base: Tensor, stack: Tensor, experts: Sequence[int], dtype: str) -> None:
        """Add some rows of one tensor.

        Args:
            base: W0, float32, shape (b, n).
            stack: Δ of the experts that have the tensor, float32, shape (K, b, n).
            experts: their indices, K of them.
            dtype: torch's name of the output's type.
        """
        where = torch.tensor(experts)[:, None], torch.tensor(experts)
        changed = (stack != 0).flatten(1).float()
        self.both[where] += (changed @ changed.T).double().cpu()
        self.numel += base.numel()
        mean = stack.sum(dim=0) / self.count
        self.kept.add(mean, cast(base + mean, getattr(torch, dtype)).float() - base)

    def add_gram(self, gram: Tensor, experts: Sequence[int]) -> None:
        """Add ⟨Δ_i, Δ_j⟩ of one tensor, or of some of its rows."""
        self.gram[torch.tensor(experts)[:, None], torch.tensor(experts)] += gram

    def absorb(self, other: Pairs) -> None:
        """Add the sums of other rows."""
        self.gram += other.gram
        self.both += other.both
        self.numel += other.numel
        self.kept.absorb(other.kept)

    def regime(self, share: float = 1.0) -> Regime:
        """Return what the sums say.

        Args:
            share: of all weights that was seen.
        """
        lengths = self.gram.diagonal().clamp_min(0).sqrt()
        alive = [i for i, length in enumerate(lengths.tolist()) if length > 0]
        pairs = list(itertools.combinations(alive, 2))
        cosines = [float(self.gram[i, j] / (lengths[i] * lengths[j])) for i, j in pairs]
        overlaps = [
            float(self.both[i, j] / min(self.both[i, i], self.both[j, j])) for i, j in pairs
        ]
        changed = (self.both.diagonal() / max(self.numel, 1)).tolist()
        return Regime(
            kind_of(cosines, [float(lengths[i]) for i in alive], [changed[i] for i in alive]),
            tuple(cosines),
            tuple(lengths.tolist()),
            tuple(changed),
            math.fsum(overlaps) / len(overlaps) if overlaps else None,
            self.kept.kept_norm,
            self.kept.kept_cosine,
            share,
        )


def kind_of(cosines: Sequence[float], lengths: Sequence[float], changed: Sequence[float]) -> str:
    """Return which of `KINDS` a group is, by the first rule that holds.

    Args:
        cosines: of the pairs of updates.
        lengths: of the updates that are not zero.
        changed: share of the weights that each of these changed.
    """
    if not cosines:
        return "single"
    if math.fsum(cosines) / len(cosines) >= _COPIES:
        return "copies"
    if min(cosines) <= _OPPOSED:
        return "opposed"
    if max(cosines) >= _OVERLAPPING:
        return "overlapping"
    # Two regimes: one that drowns the others out, and some that have no say.
    *_, second, longest = sorted(lengths)
    if longest >= _UNEQUAL * second:
        return "long"
    if longest >= _UNEQUAL * min(lengths):
        return "short"
    return "sparse" if max(changed) <= _SPARSE else "orthogonal"


def sampled(tensors: Iterable[PlannedTensor], share: float) -> list[PlannedTensor]:
    """Return the tensors of a share of the layers, evenly spaced; at least one layer.

    Args:
        tensors: of a plan, in its order.
        share: above 0; 1 is everything, tensors outside of the layers too.
    """
    everything = list(tensors)
    if share >= 1:
        return everything
    # A model without layers is sampled by its tensors.
    keys = {t.spec.name: layer_of(t.spec.name) for t in everything}
    layers = sorted({layer for layer in keys.values() if layer is not None})
    names: list[Any] = list(layers or keys)
    count = max(1, math.floor(share * len(names) + 1e-9))
    chosen = {names[(2 * i + 1) * len(names) // (2 * count)] for i in range(count)}
    return [t for t in everything if (keys[t.spec.name] if layers else t.spec.name) in chosen]
