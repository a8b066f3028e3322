"""Task vectors made sparse, weighted, added or elected: what a dozen methods are. Not a method.

ΔW = λ Σ wᵢ Δ̂ᵢ, with Δ̂ᵢ some entries of Δᵢ. Where signs are elected only the wᵢ Δ̂ᵢ of the elected
sign are added; where the sum is normalised it is divided by the weights that went into it. Names,
defaults and formulas are those of mergekit 0.1.5, which calls it generalised task arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from ...specs import TensorSpec
from ..base import Alias, MergeMethod, OfSum, Rule, Site, Update, default_role, of_each, param
from .election import disjoint_merge
from .elementwise import linear

if TYPE_CHECKING:
    from torch import Tensor

    from ...maths.passes import Drop
    from ...maths.task_vectors import TaskVectors

# What is true and false in mergekit.
_RESCALE_WORDS = {True: "l1", False: "none"}
# Weights and norms that small count as none.
_NO_WEIGHT = 1e-8
_NO_NORM = 1e-7
# What may be noted of a tensor's entries, beside its row blocks.
_NOTED_BYTES = 8_000_000

Sparse = Callable[[slice, "Tensor"], "Sequence[Tensor] | Tensor"]


def lambda_param() -> Any:
    """Return the parameter λ."""
    return param(1.0, "Factor λ of the result", minimum=-10.0, maximum=10.0, key="lambda")


def normalize_param(default: bool) -> Any:
    """Return the parameter that divides by the weights."""
    return param(default, "Divide by the sum of the weights")


def rescale_param(default: str, label: str, *choices: str) -> Any:
    """Return the parameter that says how what is kept grows."""
    return param(default, label, choices=choices, words=_RESCALE_WORDS)


# Names of releases before 0.2.
OLD_NAMES: Mapping[str, Alias] = {
    "scale": Alias("lambda"),
    "reduce": Alias("normalize", {"mean": True, "sum": False}),
}


@dataclass(frozen=True, kw_only=True)
class Sparsified(MergeMethod):
    """The base of the methods; a subclass says which entries stay, and has the fields.

    Class attributes:
        elects: whether signs are elected.
        masks: whether Δ̂ is Δ times zeros and ones, dear to find; unless it is enlarged entry by
            entry.
    """

    weighted: ClassVar[bool] = True
    aliases: ClassVar[Mapping[str, Alias]] = OLD_NAMES
    elects: ClassVar[bool] = False
    masks: ClassVar[bool] = False

    normalize: bool
    lambda_: float

    def dense(self) -> bool:
        """Return whether every entry of every expert stays as it is."""
        return True

    def rescale_to_norm(self) -> bool:
        """Return whether what stays is enlarged to the L1 norm of the whole."""
        return False

    def sparse(self, vectors: TaskVectors, site: Site) -> tuple[Sparse, Mapping[str, Any]]:
        """Return a function of a row block that gives the Δ̂ᵢ, and what the report keeps."""
        return (lambda block, stack: stack), {}

    def drop(self, vectors: TaskVectors, site: Site) -> Drop | None:
        """Return the same where entries are dropped by chance alone, else None."""
        return None

    def is_local(self) -> bool:
        """Return whether an entry is kept or dropped without looking at other rows."""
        return True

    def rule_for(self, spec: TensorSpec, experts: int) -> Rule:
        """Return the one rule for every tensor."""
        in_pieces = self.dense() or (self.is_local() and not self.rescale_to_norm())
        return Rule(self.name, default_role(spec), in_pieces=in_pieces)

    def merge(self, vectors: TaskVectors, site: Site) -> Update:
        """Make the task vectors sparse, then add what is left, or what agrees."""
        gates: Mapping[str, Any] = {}
        weights, factors = list(site.weights), [1.0] * vectors.count
        sparse: Sparse | None = None
        drop: Drop | None = None
        if not self.dense():
            sparse, gates = self.sparse(vectors, site)
            drop = self.drop(vectors, site)
            if self.rescale_to_norm():
                choose, sparse = chosen_once(vectors, sparse) if self.masks else (sparse, sparse)
                factors = l1_factors(vectors, choose, drop)

        total = sum(weights)
        divisor = total if self.normalize and abs(total) >= _NO_WEIGHT else 1.0
        coefficients = [self.lambda_ * weight / divisor for weight in weights]

        if sparse is None and not self.elects:
            return linear(coefficients, site.rule.name)
        if self.elects and sparse is not None and self.rescale_to_norm():
            sparse = _times(sparse, factors)

        # w·(f·Δ̂) = (w·f)·Δ̂, but the division is by the w alone.
        enlarged = [a * f for a, f in zip(coefficients, factors, strict=True)]
        if drop is not None and not self.elects:
            dropped = OfSum(tuple(enlarged), drop=drop)
            return Update(dropped.rows, site.rule.name, gates, of_sum=dropped)

        def rows(block: slice, stack: Tensor) -> Tensor:
            deltas = stack if sparse is None else sparse(block, stack)
            if self.elects:
                return disjoint_merge(deltas, weights, normalize=self.normalize, scale=self.lambda_)
            from ...maths.passes import combined

            return combined(deltas, enlarged)

        return Update(rows, site.rule.name, gates)


@dataclass(frozen=True, kw_only=True)
class Thinned(Sparsified):
    """The base of those that drop entries, and may enlarge what is kept."""

    density: float | tuple[float, ...] = param(
        1.0, "Share of entries to keep", minimum=0.0, maximum=1.0, each=True
    )
    normalize: bool = normalize_param(False)
    rescale: str = rescale_param("none", "Enlarge what is kept to the whole norm", "none", "l1")
    lambda_: float = lambda_param()

    def dense(self) -> bool:
        """Return whether nothing is dropped."""
        return all(share >= 1 for share in of_each(self.density, 1))

    def rescale_to_norm(self) -> bool:
        """Return whether the L1 norm of the whole is restored."""
        return self.rescale == "l1"


def _times(sparse: Sparse, factors: Sequence[float]) -> Sparse:
    def scaled(block: slice, stack: Tensor) -> list[Tensor]:
        return [x * f for x, f in zip(sparse(block, stack), factors, strict=True)]

    return scaled


def chosen_once(vectors: TaskVectors, sparse: Sparse) -> tuple[Sparse, Sparse]:
    """Return a function that notes which entries stay, and one that repeats it, to the bit.

    Both are `sparse` itself where there would be more to note than a few MB, one bit an entry.

    Args:
        vectors: of the tensor; the first function is called with all of its blocks.
        sparse: gives Δ times zeros and ones.
    """
    import numpy as np
    import torch

    m, n = vectors.shape
    blocks = vectors.blocks()
    if vectors.device.type != "cpu" or not blocks or vectors.count * m * n > 8 * _NOTED_BYTES:
        return sparse, sparse
    height = blocks[0].stop
    # Taken at once, so that no heap is broken into pieces.
    noted = np.zeros((len(blocks), vectors.count, -(-height * n // 8)), np.uint8)

    def note(block: slice, stack: Tensor) -> Sequence[Tensor] | Tensor:
        kept = sparse(block, stack)
        for bits, values in zip(noted[block.start // height], kept, strict=True):
            packed = np.packbits(values.numpy() != 0)
            bits[: packed.size] = packed
        return kept

    def repeat(block: slice, stack: Tensor) -> Sequence[Tensor]:
        found = []
        for bits, delta in zip(noted[block.start // height], stack, strict=True):
            mask = np.unpackbits(bits, count=delta.numel())
            found.append(delta * torch.from_numpy(mask).view_as(delta))
        return found

    return note, repeat


def l1_factors(vectors: TaskVectors, sparse: Sparse, drop: Drop | None = None) -> list[float]:
    """Return ‖Δᵢ‖₁ / ‖Δ̂ᵢ‖₁ over the whole tensor, 1 where either is nearly nothing.

    Args:
        vectors: of the tensor.
        sparse: gives the Δ̂ᵢ of a row block.
        drop: the same where chance alone decides.
    """
    from ...maths.passes import length_1

    before, after = [0.0] * vectors.count, [0.0] * vectors.count

    def lengths(block: slice) -> list[list[float]]:
        if drop is not None:
            return vectors.dropped_lengths(block, drop)
        stack = vectors.stack(block)
        pairs = zip(stack, sparse(block, stack), strict=True)
        return [[length_1(delta), length_1(kept)] for delta, kept in pairs]

    for of_block in vectors.cores.each_run(vectors.blocks(), lengths):
        for i, (whole, kept) in enumerate(of_block):
            before[i] += whole
            after[i] += kept
    return [
        x / y if x >= _NO_NORM and y >= _NO_NORM else 1.0
        for x, y in zip(before, after, strict=True)
    ]
