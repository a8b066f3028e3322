"""The sparse methods: which entries of each task vector stay × how what is left is combined.

ΔW = λ Σ wᵢ Δ̂ᵢ, with Δ̂ᵢ some entries of Δᵢ. Where signs are elected only the wᵢ Δ̂ᵢ of the elected
sign are added; where the sum is normalised it is divided by the weights that went into it. Names,
parameters, defaults and formulas are those of mergekit 0.1.5, which calls it generalised task
arithmetic; at its default density of 1 nothing is dropped. `presets` have what papers and other
codes do.

| what stays | added | signs elected |
|---|---|---|
| everything | `task_arithmetic` | |
| the largest | | `ties` |
| neither the largest nor the smallest | `breadcrumbs` | `breadcrumbs_ties` |
| by chance | `dare_linear` | `dare_ties` |
| by chance, the large more often | `della_linear` | `della` |
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from ..maths.lazy import TaskVectors, Tensor, np, passes, rounding, torch
from ..memory import BLOCK_ELEMENTS
from ..specs import TensorSpec
from .base import (
    Alias,
    Counter,
    MergeMethod,
    OfSum,
    Rule,
    Site,
    Update,
    default_role,
    of_each,
    param,
)
from .parts.election import disjoint_merge
from .parts.elementwise import linear
from .parts.trimming import ModelThresholds, magnitudes_at, tensor_thresholds

_RESCALES = ("l1", "inverse", "none")
# What is true and false in mergekit.
_RESCALE_WORDS = {True: "l1", False: "none"}
# Weights and norms that small count as none.
_NO_WEIGHT = 1e-8
_NO_NORM = 1e-7
# Seconds on two cores for an entry of each expert (docs/performance.md, "Beside copying").
_ELECTING = 2.0e-9
# What may be noted of a tensor's entries: of a 70B model's largest layers, not of a vocabulary.
_NOTED_BYTES = 100_000_000

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


# Names of releases before 1.0.
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
        thinning: seconds on two cores to decide about an entry.
    """

    weighted: ClassVar[bool] = True
    aliases: ClassVar[Mapping[str, Alias]] = OLD_NAMES
    elects: ClassVar[bool] = False
    masks: ClassVar[bool] = False
    thinning: ClassVar[float] = 0.0

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

    def drop(self, vectors: TaskVectors, site: Site) -> passes.Drop | None:
        """Return the same where entries are dropped by chance alone, else None."""
        return None

    def entry_seconds(self) -> float:
        """Return the time of deciding what stays, and of electing signs."""
        return (0.0 if self.dense() else self.thinning) + (_ELECTING if self.elects else 0.0)

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
        drop: passes.Drop | None = None
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
            return passes.combined(deltas, enlarged)

        return Update(rows, site.rule.name, gates)


@dataclass(frozen=True, kw_only=True)
class TaskArithmetic(Sparsified):
    """Every tensor is the base plus a scaled sum (or mean) of the experts' differences to it."""

    # Paper: Eq. 4. Its baseline is the sum with λ = 1 (its A.2); the authors' release means the
    # mean by the same word (docs/paper.md).
    name: ClassVar[str] = "task_arithmetic"
    title: ClassVar[str] = "Task arithmetic"
    paper: ClassVar[str] = "Ilharco et al. 2023, Editing models with task arithmetic"
    url: ClassVar[str] = "https://arxiv.org/abs/2212.04089"
    low_rank: ClassVar[bool] = True
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": {"normalize": False, "lambda": 1.0},
        "release": {"normalize": True},
        "fusion_bench": {"normalize": False, "lambda": 0.3},
    }

    normalize: bool = normalize_param(False)
    lambda_: float = lambda_param()

    def rule_for(self, spec: TensorSpec, experts: int) -> Rule:
        """Return one rule for every tensor: ``sum`` or ``mean``."""
        return Rule("mean" if self.normalize else "sum", default_role(spec))


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


@dataclass(frozen=True, kw_only=True)
class Ties(Thinned):
    """Of each expert's changes the largest are kept; every weight then takes the mean of those
    that have the sign with more total weight."""

    # Paper: 20 % of the whole model (exact here, by two counting passes), and so do
    # prateeky2806/ties-merging and MergeBench; MergeLLM ranks each tensor; fusion_bench adds
    # instead of averaging. Entries equal to the threshold are all kept, as in the original;
    # mergekit cuts them in the order of a sort.
    name: ClassVar[str] = "ties"
    title: ClassVar[str] = "TIES"
    paper: ClassVar[str] = "Yadav et al. 2023, TIES-Merging"
    url: ClassVar[str] = "https://arxiv.org/abs/2306.01708"
    elects: ClassVar[bool] = True
    thinning: ClassVar[float] = 2.5e-9
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
        return ModelThresholds(number, counted, experts, self.density)

    def sparse(self, vectors: TaskVectors, site: Site) -> tuple[Sparse, Mapping[str, Any]]:
        """Return the trimmed task vectors."""
        gates: dict[str, Any] = {}
        if self.trim == "model":
            thresholds = [site.counted["trim_thresholds"][i] for i in site.experts]
        else:
            thresholds = tensor_thresholds(vectors, self.density)
            gates = {"trim_thresholds": thresholds}

        def trimmed(block: slice, stack: Tensor) -> Tensor:
            kept = torch.empty_like(stack)
            for delta, tau, out in zip(stack, thresholds, kept, strict=True):
                passes.shrunk(delta, tau, out)
            return kept

        return trimmed, gates


@dataclass(frozen=True, kw_only=True)
class Between(Thinned):
    """Of each expert's changes the largest and the smallest are dropped.

    Of d entries the ⌊γ·d⌋ of largest magnitude go, then ⌊density·d⌋ stay. Where that is more than
    is left, fewer of the largest go. Entries equal to either threshold are all kept; mergekit cuts
    them in a sort's order.
    """

    paper: ClassVar[str] = "Davari and Belilovsky 2023, Model breadcrumbs"
    url: ClassVar[str] = "https://arxiv.org/abs/2312.06795"
    thinning: ClassVar[float] = 5.0e-9

    gamma: float | tuple[float, ...] = param(
        0.01, "Share of largest entries to drop", minimum=0.0, maximum=1.0, each=True
    )

    def is_local(self) -> bool:
        """Return False: entries are ranked in the whole tensor."""
        return False

    def sparse(self, vectors: TaskVectors, site: Site) -> tuple[Sparse, Mapping[str, Any]]:
        """Return the task vectors between two magnitudes."""
        m, n = vectors.shape
        shares = zip(
            of_each(self.density, vectors.count), of_each(self.gamma, vectors.count), strict=True
        )
        places = [ranks(m * n, density, gamma) for density, gamma in shares]

        def twice(block: slice, stack: Tensor) -> list[Tensor]:
            return [delta for delta in stack for _ in range(2)]

        found = magnitudes_at(vectors, [rank for pair in places for rank in pair], twice)
        bounds = []
        for i, (first, last) in enumerate(places):
            upper = found[2 * i] if first is not None else math.inf
            lower = found[2 * i + 1] if last is not None else (0.0 if first is None else math.inf)
            bounds.append((lower or 0.0, math.inf if upper is None else upper))

        def between(block: slice, stack: Tensor) -> Sequence[Tensor]:
            kept = []
            for delta, (lower, upper) in zip(stack, bounds, strict=True):
                part = passes.shrunk(delta, lower)
                if math.isfinite(upper):
                    part = part.sub_(torch.nn.functional.hardshrink(delta, upper))
                kept.append(part)
            return kept

        return between, {"trim_bounds": [list(pair) for pair in bounds]}


@dataclass(frozen=True, kw_only=True)
class Breadcrumbs(Between):
    """Each expert loses its largest and its smallest changes; what is left is added."""

    name: ClassVar[str] = "breadcrumbs"
    title: ClassVar[str] = "Breadcrumbs"


@dataclass(frozen=True, kw_only=True)
class BreadcrumbsTies(Between):
    """Each expert loses its largest and its smallest changes; every weight then takes the sum of
    those that have the sign with more total weight."""

    name: ClassVar[str] = "breadcrumbs_ties"
    title: ClassVar[str] = "Breadcrumbs + TIES"
    elects: ClassVar[bool] = True


@dataclass(frozen=True, kw_only=True)
class Dropped(Thinned):
    """Each expert keeps a random share of its changes, enlarged to make up for the rest.

    Keep each entry with probability p, then divide by p (the paper, and yule-BUAA/MergeLM) or match
    the L1 norm of the tensor (mergekit). Seeds come from the tensor's name and the expert's
    position, so the result depends on nothing else.
    """

    paper: ClassVar[str] = "Yu et al. 2024, DARE"
    url: ClassVar[str] = "https://arxiv.org/abs/2311.03099"
    thinning: ClassVar[float] = 1.7e-9
    earlier: ClassVar[Mapping[str, Any]] = {"density": 0.2, "rescale": "inverse"}

    rescale: str = rescale_param(
        "l1", "How kept entries grow: to the tensor's L1 norm, by 1/density, or not", *_RESCALES
    )

    def drop(self, vectors: TaskVectors, site: Site) -> passes.Drop | None:
        """Return which entries stay."""
        return self._drop(vectors, site)

    def sparse(self, vectors: TaskVectors, site: Site) -> tuple[Sparse, Mapping[str, Any]]:
        """Return the dropped task vectors."""
        return self._drop(vectors, site).of_block, {}

    def _drop(self, vectors: TaskVectors, site: Site) -> passes.Drop:
        densities = of_each(self.density, vectors.count)
        return drop_of(site, vectors.shape[1], densities, inverse=self.rescale == "inverse")


@dataclass(frozen=True, kw_only=True)
class DareLinear(Dropped):
    """Each expert keeps a random share of its changes, enlarged to make up for the rest; the
    results are added (or averaged)."""

    name: ClassVar[str] = "dare_linear"
    title: ClassVar[str] = "DARE"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": {"density": 0.2, "rescale": "inverse"},
    }


@dataclass(frozen=True, kw_only=True)
class DareTies(Dropped):
    """Each expert keeps a random share of its changes, enlarged to make up for the rest; every
    weight then takes the sum (or mean) of those that have the sign with more total weight."""

    # Paper: ResMerge's baseline has density 0.2 and does not say which code. MergeLM trims again
    # by magnitude; its mask rate 0.8 is keep 0.2.
    name: ClassVar[str] = "dare_ties"
    title: ClassVar[str] = "DARE + TIES"
    elects: ClassVar[bool] = True
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": {"density": 0.2, "rescale": "inverse", "normalize": True},
        "mergelm": {"density": 0.2, "rescale": "inverse", "trim": "tensor", "normalize": True},
    }
    earlier: ClassVar[Mapping[str, Any]] = {
        "density": 0.2, "rescale": "inverse", "normalize": True,
    }  # fmt: skip

    trim: str = param("none", "Trim by magnitude too (MergeLM)", choices=("none", "tensor"))

    def is_local(self) -> bool:
        """Return whether nothing is ranked."""
        return self.trim == "none"

    def drop(self, vectors: TaskVectors, site: Site) -> passes.Drop | None:
        """Return which entries stay, where chance alone decides."""
        return self._drop(vectors, site) if self.trim == "none" else None

    def sparse(self, vectors: TaskVectors, site: Site) -> tuple[Sparse, Mapping[str, Any]]:
        """Return the dropped task vectors, trimmed where asked."""
        dropped, gates = super().sparse(vectors, site)
        if self.trim == "none":
            return dropped, gates
        thresholds = tensor_thresholds(vectors, self.density, dropped)

        def trimmed(block: slice, stack: Tensor) -> Sequence[Tensor]:
            kept = dropped(block, stack)
            return [passes.shrunk(delta, tau) for delta, tau in zip(kept, thresholds, strict=True)]

        return trimmed, gates


@dataclass(frozen=True, kw_only=True)
class MagnitudeDropped(Thinned):
    """Each expert keeps a random share of its changes, of the large ones more.

    In each row the entry of rank r of n magnitudes (1 the smallest) stays with probability
    density − ε + 2ε·(r − 1)/(n − 1). A vector is one row. Equal magnitudes are ranked in their
    order in the row. The random numbers are our own (`key_of`): the same distribution as
    mergekit's, not the same bits.
    """

    paper: ClassVar[str] = "Deep et al. 2024, DELLA-Merging"
    url: ClassVar[str] = "https://arxiv.org/abs/2406.11617"

    masks: ClassVar[bool] = True
    thinning: ClassVar[float] = 8.0e-9

    epsilon: float | tuple[float, ...] = param(
        0.15, "How much likelier large entries stay", minimum=0.0, maximum=0.5, each=True
    )
    rescale: str = rescale_param(
        "l1", "How kept entries grow: to the tensor's L1 norm, by 1/probability, or not", *_RESCALES
    )

    def check_weights(self, weights: tuple[float, ...]) -> str | None:
        """Return a problem where a probability would leave (0, 1)."""
        count = max(len(weights), 1)
        for density, epsilon in zip(
            of_each(self.density, count), of_each(self.epsilon, count), strict=False
        ):
            if 0 < density < 1 and not (density - epsilon > 0 and density + epsilon < 1):
                return (
                    f"{self.name}: density {density:g} − and + epsilon {epsilon:g} must both lie "
                    "between 0 and 1, for they are probabilities. Give a smaller epsilon."
                )
        return None

    def kept_bytes(self, spec: TensorSpec, rule: Rule, experts: int) -> int:
        """Return bytes of a row block's ranking and what it leaves, and of the note what stays."""
        if self.dense():
            return 0
        entries = math.prod(spec.shape)
        noted = noted_bytes(experts * entries) if self.rescale_to_norm() else 0
        return noted + 4 * (experts + 4) * min(entries, BLOCK_ELEMENTS)

    def sparse(self, vectors: TaskVectors, site: Site) -> tuple[Sparse, Mapping[str, Any]]:
        """Return the task vectors with entries dropped by rank and chance."""
        densities = of_each(self.density, vectors.count)
        epsilons = of_each(self.epsilon, vectors.count)
        inverse = self.rescale == "inverse"
        is_row = len(site.spec.shape) < 2

        def dropped(block: slice, stack: Tensor) -> list[Tensor]:
            kept = []
            for i, (delta, p, e) in enumerate(zip(stack, densities, epsilons, strict=True)):
                if p <= 0:
                    delta = delta * 0
                elif p < 1:
                    rows = delta.T if is_row else delta
                    numbers = key_of(site, i), place_of(site, block, delta)
                    chances = chances_of(rows.shape[1], p, e)
                    found = passes.dropped_by_rank(rows, *numbers, chances, inverse=inverse)
                    delta = found.T if is_row else found
                kept.append(delta)
            return kept

        return dropped, {}


@dataclass(frozen=True, kw_only=True)
class DellaLinear(MagnitudeDropped):
    """Each expert keeps a random share of its changes, of the large ones more, enlarged to make up
    for the rest; the results are added."""

    name: ClassVar[str] = "della_linear"
    title: ClassVar[str] = "DELLA, linear"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": {"rescale": "inverse"},
    }


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


def ranks(numel: int, density: float, gamma: float) -> tuple[int | None, int | None]:
    """Return the ranks, from the largest, of the first and the last entry that is kept.

    None where there is no such bound; (1, None) where nothing is kept.
    """
    if density >= 1 or not numel:
        return None, None
    kept, above = int(density * numel), int(gamma * numel)
    below = max(0, numel - kept - above)
    above = numel - kept - below
    if kept == 0:
        return 1, None
    return (above + 1 if above else None), above + kept


def drop_of(site: Site, columns: int, densities: Sequence[float], *, inverse: bool) -> passes.Drop:
    """Return which entries of a matrix stay.

    Args:
        site: gives the seed.
        columns: n.
        densities: pᵢ, the probability of keeping an entry, one an expert.
        inverse: divide what is kept by pᵢ.
    """
    return passes.Drop(
        keys=tuple(key_of(site, i) for i in range(len(densities))),
        first=site.start_row * columns,
        densities=tuple(densities),
        factors=tuple(1 / p if inverse and 0 < p < 1 else 1.0 for p in densities),
    )


def key_of(site: Site, expert: int) -> int:
    """Return the key of the random numbers of a tensor and an expert."""
    return rounding.block_seed(site.seed, f"expert {expert}", 0)


def place_of(site: Site, block: slice, delta: Tensor) -> int:
    """Return the place of a row block's first entry in its tensor: the order of work, shards and
    budget change nothing."""
    row: int = site.start_row + block.start
    return row * delta.shape[1]


def chances_of(n: int, density: float, epsilon: float) -> Tensor:
    """Return the probabilities of keeping the n entries of a row, of the smallest magnitude first.

    Args:
        n: length of a row.
        density, epsilon: the middle and half the width of the probabilities.
    """
    return torch.linspace(density - epsilon, density + epsilon, n)


def _times(sparse: Sparse, factors: Sequence[float]) -> Sparse:
    def scaled(block: slice, stack: Tensor) -> list[Tensor]:
        return [x * f for x, f in zip(sparse(block, stack), factors, strict=True)]

    return scaled


def noted_bytes(entries: int) -> int:
    """Return bytes of a bit for each of so many entries; 0 where that is too much to keep."""
    nbytes = -(-entries // 8)
    return nbytes if nbytes <= _NOTED_BYTES else 0


def chosen_once(vectors: TaskVectors, sparse: Sparse) -> tuple[Sparse, Sparse]:
    """Return a function that notes which entries stay, and one that repeats it, to the bit.

    Both are `sparse` itself where there is more to note than `noted_bytes` allows, a bit an entry.

    Args:
        vectors: of the tensor; the first function is called with all of its blocks.
        sparse: gives Δ times zeros and ones.
    """
    m, n = vectors.shape
    blocks = vectors.blocks()
    if vectors.device.type != "cpu" or not blocks or not noted_bytes(vectors.count * m * n):
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


def l1_factors(
    vectors: TaskVectors, sparse: Sparse, drop: passes.Drop | None = None
) -> list[float]:
    """Return ‖Δᵢ‖₁ / ‖Δ̂ᵢ‖₁ over the whole tensor, 1 where either is nearly nothing.

    Args:
        vectors: of the tensor.
        sparse: gives the Δ̂ᵢ of a row block.
        drop: the same where chance alone decides.
    """
    before, after = [0.0] * vectors.count, [0.0] * vectors.count

    def lengths(block: slice) -> list[list[float]]:
        if drop is not None:
            return vectors.dropped_lengths(block, drop)
        stack = vectors.stack(block)
        pairs = zip(stack, sparse(block, stack), strict=True)
        return [[passes.l1_norm(delta), passes.l1_norm(kept)] for delta, kept in pairs]

    for of_block in vectors.cores.each_run(vectors.blocks(), lengths):
        for i, (whole, kept) in enumerate(of_block):
            before[i] += whole
            after[i] += kept
    return [
        x / y if x >= _NO_NORM and y >= _NO_NORM else 1.0
        for x, y in zip(before, after, strict=True)
    ]


METHODS = (
    TaskArithmetic, Ties, Breadcrumbs, BreadcrumbsTies, DareLinear, DareTies, DellaLinear, Della,
)  # fmt: skip
