"""The contract of a merge method: its parameters, its rule for every tensor, its merge of one.

A method is one file in this folder that ends in ``METHOD = TheClass``, or one of a family's file,
which ends in ``METHODS = (…)``. The class is a frozen
dataclass whose fields are its parameters; from them come the recipe keys, the command line, the
Space's controls and the card. A recipe may give a number by layer, by module or by model: the plan
makes one instance for each combination, so a method sees plain numbers. Files here take torch and
the maths from ``maths.lazy``, so that planning and ``--help`` stay light.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from ..maths.lazy import TaskVectors, Tensor, low_rank, passes
from ..roles import MATRIX_ROLES, Role, role_of
from ..specs import TensorSpec

if TYPE_CHECKING:
    from ..maths.low_rank import LowRank


@dataclass(frozen=True, slots=True)
class Rule:
    """What will be done with a tensor.

    Attributes:
        name: as the report counts it: ``resmerge``, ``mean``, ``sum``, ``base``, …
        role: what part of the model the tensor is.
        needs_matrix: whether a matrix is decided as a whole (S2 in docs/methods.md); otherwise
            row blocks suffice, whatever the tensor's size.
        copies: whether one whole task vector is copied to float32 at a time where there is no room
            for all of them; else row blocks are read again and again there.
        as_one: whether gate and up in one tensor are decomposed as one matrix.
        in_pieces: whether ranges of rows can be merged on their own. False hands the whole
            tensor to one `merge` call, still without float32 copies of it.
    """

    name: str
    role: Role
    needs_matrix: bool = False
    copies: bool = True
    in_pieces: bool = True
    as_one: bool = False


@dataclass(frozen=True, slots=True)
class Combination:
    """ΔW = Σ aᵢ Δᵢ + L·Rᵀ: of low rank wherever all Δᵢ are.

    Attributes:
        coefficients: a, one an expert.
        left: L, shape (m, K), or None.
        right: R, shape (n, K), or None.
    """

    coefficients: tuple[float, ...]
    left: Tensor | None = None
    right: Tensor | None = None

    def of(self, vectors: TaskVectors) -> LowRank | None:
        """Return ΔW from the experts' factors, or None where some have none and count."""
        parts = []
        if any(self.coefficients):
            if vectors.low_rank is None:
                return None
            found = zip(vectors.low_rank, self.coefficients, strict=True)
            parts = [factors.scaled(a) for factors, a in found if a]
        if self.left is not None and self.right is not None:
            parts.append(low_rank.LowRank(self.left, self.right))
        return low_rank.concatenated(parts) if parts else None

    def scaled(self, factor: float) -> Combination:
        """Return `factor`·ΔW."""
        left = None if self.left is None else self.left * factor
        return Combination(tuple(a * factor for a in self.coefficients), left, self.right)


@dataclass(frozen=True, slots=True)
class OfSum:
    """ΔW as a function of Σ aᵢ Δᵢ + e·W0 alone, for which no Δᵢ has to be kept.

    Attributes:
        coefficients: a, one an expert.
        added: ``added(block, total)`` returns ΔW of a row block from the sum there, float32,
            shape (b, n), which it may modify; None where the sum is ΔW.
        own: e, the share of W0 itself, where the merge is of whole weights.
        drop: which entries of the Δᵢ count; all when None.
    """

    coefficients: tuple[float, ...]
    added: Callable[[slice, Tensor], Tensor] | None = None
    own: float = 0.0
    drop: passes.Drop | None = None

    def finish(self, block: slice, total: Tensor) -> Tensor:
        """Return ΔW of a row block from the sum there, which may be modified."""
        return total if self.added is None else self.added(block, total)

    def rows(self, block: slice, stack: Tensor) -> Tensor:
        """Return ΔW of a row block from the experts' Δ there, where e is 0."""
        deltas = stack if self.drop is None else self.drop.of_block(block, stack)
        return self.finish(block, passes.combined(deltas, self.coefficients))


@dataclass(frozen=True, slots=True)
class Update:
    """What a method decided for one matrix.

    Attributes:
        rows: ``rows(block, stack)`` returns ΔW of a row block, float32, shape (b, n), from the
            block's slice and the experts' Δ there, shape (N, b, n), which it must not modify.
        rule: the rule that was applied, where a guard chose another one than planned.
        gates: what the report keeps about the decision.
        warnings: what a reader of the report must know.
        combination: the same ΔW in closed form, where it has one.
        moves_base: whether rows that no expert changed are merged too; otherwise they keep the
            base's bytes.
        needs_stack: whether `rows` looks at the experts' Δ.
        of_sum: what `rows` is a method of, where a sum is all that it looks at.
    """

    rows: Callable[[slice, Tensor], Tensor]
    rule: str
    gates: Mapping[str, Any] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    combination: Combination | None = None
    moves_base: bool = False
    needs_stack: bool = True
    of_sum: OfSum | None = None

    def factors(self, vectors: TaskVectors) -> LowRank | None:
        """Return ΔW as L·Rᵀ, or None where it is not given so."""
        if self.combination is None or vectors.low_rank is None:
            return None
        return self.combination.of(vectors)


NO_TENSOR = TensorSpec("", "F32", ())


@dataclass(frozen=True, slots=True)
class Site:
    """Where in the model a merge happens; the only thing a method knows beside the numbers.

    Attributes:
        rule: the planned rule.
        weights: one factor for each expert at hand, 1.0 where the recipe gave none.
        seed: depends on the user's seed and the tensor; for methods that draw random numbers.
        spec: the whole tensor, as it is written.
        start_row: which row of the tensor is the first of the vectors at hand.
        layers: how many blocks the model has.
        counted: what the method's counting passes found in the whole model.
        experts: which of the model's experts are at hand, from 0: some may lack this tensor. What
            was counted is ordered like the model's. All of them when not given.
        base_weight: the weight with which the model that the differences are taken from takes part
            itself; None: it does not.
    """

    rule: Rule
    weights: tuple[float, ...]
    seed: int = 0
    spec: TensorSpec = NO_TENSOR
    start_row: int = 0
    layers: int = 0
    counted: Mapping[str, Any] = field(default_factory=dict)
    experts: tuple[int, ...] = ()
    base_weight: float | None = None

    def __post_init__(self) -> None:
        if not self.experts:
            object.__setattr__(self, "experts", tuple(range(len(self.weights))))


class Counter(Protocol):
    """One counting pass over all merged tensors of the sources."""

    def add(self, vectors: TaskVectors, site: Site) -> None:
        """Count a matrix, or some rows of one."""
        ...

    def result(self) -> dict[str, Any]:
        """Return what was found, as JSON-able data; it does not depend on the order of `add`."""
        ...


Each = float | tuple[float, ...]


def param(
    default: Any,
    label: str,
    *,
    minimum: float | None = None,
    maximum: float | None = None,
    choices: tuple[str, ...] = (),
    each: bool = False,
    key: str = "",
    words: Mapping[Any, str] | None = None,
) -> Any:
    """Return a dataclass field that is a method's parameter.

    Args:
        default: also fixes the type: bool, int, float or str.
        label: one line for people.
        minimum, maximum: inclusive bounds of a number.
        choices: the allowed words of a str.
        each: whether every model may have its own number; the field is then that number, or a
            tuple with one for each expert (`of_each` reads both).
        key: what recipes call it, where Python cannot (``lambda``).
        words: other spellings of a choice, such as mergekit's true and false.
    """
    metadata = {
        "label": label,
        "minimum": minimum,
        "maximum": maximum,
        "choices": choices,
        "each": each,
        "key": key,
        "words": dict(words or {}),
    }
    return field(default=default, metadata=metadata)


def of_each(value: Each, count: int) -> tuple[float, ...]:
    """Return a parameter's number for each of `count` experts."""
    return value if isinstance(value, tuple) else (value,) * count


def key_of(parameter: dataclasses.Field[Any]) -> str:
    """Return what recipes call a parameter."""
    return str(parameter.metadata["key"]) or parameter.name


@dataclass(frozen=True, slots=True)
class Alias:
    """An earlier name of a parameter.

    Attributes:
        key: today's name.
        values: what earlier values are called today; others are taken as they are.
    """

    key: str
    values: Mapping[Any, Any] = field(default_factory=dict)


OTHER_CHOICES = ("mean", "sum", "base")


@dataclass(frozen=True, kw_only=True)
class MergeMethod(ABC):
    """Base of every method.

    Class attributes:
        name: what recipes call it.
        title: for people.
        paper: citation, with the public code that it follows.
        url: of the paper.
        weighted: whether a weight for each expert is understood.
        weight_key: what recipes call that weight.
        base: ``required`` (task vectors are differences to it), ``optional`` (they are, where the
            recipe has one) or ``input`` (it is one model among the others).
        models: how many models beside the base, at least and at most.
        low_rank: whether the result is of low rank where all task vectors are.
        in_pieces: what the rule says of it, where all tensors have one rule.
        presets: settings of a paper or of public code, by name.
        aliases: earlier names of parameters.
        earlier: defaults of the releases before 1.0, where they were others.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    paper: ClassVar[str]
    url: ClassVar[str]
    weighted: ClassVar[bool] = False
    weight_key: ClassVar[str] = "weight"
    base: ClassVar[str] = "required"
    models: ClassVar[tuple[int, int | None]] = (1, None)
    low_rank: ClassVar[bool] = False
    in_pieces: ClassVar[bool] = True
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    aliases: ClassVar[Mapping[str, Alias]] = {}
    earlier: ClassVar[Mapping[str, Any]] = {}

    def rule_for(self, spec: TensorSpec, experts: int) -> Rule:
        """Return the rule for a tensor, from its name and shape alone: one for all, by default.

        Args:
            spec: the tensor as the base stores it, with a float dtype.
            experts: N.
        """
        return Rule(self.name, default_role(spec), in_pieces=self.in_pieces)

    @abstractmethod
    def merge(self, vectors: TaskVectors, site: Site) -> Update:
        """Merge one matrix.

        Args:
            vectors: the experts' task vectors, finite; not all are zero.
            site: where it is in the model.

        The result must not depend on anything but these arguments and the parameters.
        """

    def check_weights(self, weights: tuple[float, ...]) -> str | None:
        """Return what is wrong with the weights, or with parameters of one tensor; None if nothing.

        Args:
            weights: of the base, where it takes part itself, then of the experts.
        """
        return None

    def keeps_low_rank(self, weights: tuple[float, ...], base_weight: float | None) -> bool:
        """Return whether task vectors of low rank give a result of low rank.

        Args:
            weights: of the experts.
            base_weight: of the base, where it takes part itself.
        """
        return self.low_rank

    def counting_passes(self) -> int:
        """Return how often the sources are read before the merge, for numbers of the whole model.

        The plan counts these bytes and this time.
        """
        return 0

    def counter(self, number: int, counted: Mapping[str, Any], experts: int) -> Counter:
        """Return a fresh counter for pass `number` (from 0), given what earlier passes found.

        Raises:
            ValueError: this method has no such pass.
        """
        raise ValueError(f"{self.name} has no counting pass {number}")

    def directions(self, m: int, n: int) -> int:
        """Return how many leading directions of each expert's m × n matrix have to be found.

        The estimate of time goes by it: all of them where a method doesn't say otherwise.
        """
        return min(m, n)

    def columns(self, m: int, n: int, experts: int) -> int:
        """Return with how many columns each expert's m × n matrix is multiplied altogether.

        The estimate of time goes by it where it is not zero, and no longer by `directions`.
        """
        return 0

    def entry_seconds(self) -> float:
        """Return what an entry of each expert takes on two cores, beside reading it.

        The estimate of time goes by it where a tensor is not decomposed.
        """
        return 0.0

    def scratch_bytes(self, m: int, n: int, experts: int) -> int:
        """Return bytes needed for one m × n matrix beside the float32 task vectors."""
        return 0

    def shared_scratch_bytes(self, m: int, n: int) -> int:
        """Return bytes that one matrix at a time may need beside `scratch_bytes`."""
        return 0

    def kept_bytes(self, spec: TensorSpec, rule: Rule, experts: int) -> int:
        """Return bytes that are kept of a tensor while it is decided, beside a row block's."""
        return 0

    def in_words(self) -> str:
        """Return how this method decides, for the card; Markdown."""
        return (type(self).__doc__ or "").strip()

    def parameters(self) -> dict[str, Any]:
        """Return the parameters by the names that recipes have for them."""
        return {key_of(item): getattr(self, item.name) for item in dataclasses.fields(self)}


def is_matrix(spec: TensorSpec, role: Role) -> bool:
    """Return whether a tensor is a matrix to decompose, or a stack of them ([E, m, n])."""
    if role not in MATRIX_ROLES or 0 in spec.shape:
        return False
    # Of three axes only stacks of real matrices count, not the kernels of a convolution.
    return len(spec.shape) == 2 or (len(spec.shape) == 3 and min(spec.shape[1:]) > 4)


def default_role(spec: TensorSpec) -> Role:
    """Return the role by the names of current architectures."""
    return role_of(spec.name, spec.shape)
