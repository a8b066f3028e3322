"""What a plan is: its options, its tensors, and everything that a merge will do. No torch."""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn, Self

from ..device import Machine, machine_share
from ..errors import Notice, PlanRefusedError
from ..memory import HELD_BYTES, PIECE_BYTES
from ..methods import MergeMethod, Rule
from ..recipe import ModelRef, Recipe
from ..roles import depth_of, pattern_of
from ..sinks.layout import Shard, index_json
from ..sinks.provenance import Known, digest_of
from ..sinks.publication import Publication
from ..sources import Checkpoint
from ..sources.adapter import Adapter
from ..sources.adapter_config import CONFIG as ADAPTER_CONFIG
from ..sources.fused import Fused
from ..specs import TensorSpec
from ..version import __version__
from .options import Options
from .request import Request
from .resolve import Resolver
from .sidefiles import side_files

if TYPE_CHECKING:
    from ..sinks.hub.target import HubTarget


@dataclass(frozen=True, slots=True)
class OutputFactors:
    """How an adapter as output holds a tensor's update, s·B·A with s = 1.

    Attributes:
        rank: r.
        module: what PEFT calls the module.
        down: A, r × in, as it is written.
        up: B, out × r, likewise.
        flipped: whether the base's tensor is (in, out), so that it gets (B·A)ᵀ.
    """

    rank: int
    module: str
    down: TensorSpec
    up: TensorSpec
    flipped: bool


@dataclass(frozen=True, slots=True)
class PlannedTensor:
    """One output tensor.

    Attributes:
        spec: as it is written.
        rule: what is done with it; None carries the layout's bytes through.
        method: merges it, with this tensor's own parameters.
        experts: which of the plan's experts take part here, from 0.
        weights: their factors, 1.0 where none was given.
        base_weight: the weight with which the model that gives the layout takes part itself; None:
            it does not.
        fused: how matrices that are decomposed apart lie in it; None: it is one, or a stack.
        factors: what is written instead of the tensor, where the output is an adapter.
        reads_layout: whether the values of the layout's model are read.
        sources: the layout, then the experts that take part.
        resident: whether float32 task vectors of all experts are kept at once.
        working_bytes: of float32 memory, held while a piece of it is in work.
    """

    spec: TensorSpec
    rule: Rule | None
    method: MergeMethod
    experts: tuple[int, ...] = ()
    weights: tuple[float, ...] = ()
    base_weight: float | None = None
    fused: Fused | None = None
    factors: OutputFactors | None = None
    reads_layout: bool = True
    sources: tuple[Checkpoint, ...] = field(default=(), repr=False)
    resident: bool = True
    working_bytes: int = 0

    @property
    def is_quantised(self) -> bool:
        """Whether the merge is written in FP8, with scales."""
        return self.rule is not None and self.spec.dtype == "F8_E4M3"

    @property
    def stored(self) -> tuple[TensorSpec, ...]:
        """What is written of it, in the order of the file."""
        if self.factors is not None:
            return self.factors.down, self.factors.up
        return (self.spec.scales, self.spec) if self.is_quantised else (self.spec,)

    @property
    def output_bytes(self) -> int:
        """Bytes that are written of it."""
        return sum(spec.nbytes for spec in self.stored)

    @property
    def read(self) -> tuple[Checkpoint, ...]:
        """The sources whose values are read."""
        return self.sources if self.reads_layout else self.sources[1:]

    @property
    def is_decomposed(self) -> bool:
        """Whether its rule needs whole matrices."""
        return self.rule is not None and self.rule.needs_matrix

    @property
    def is_stack(self) -> bool:
        """Whether its matrices [E, m, n] are decomposed one by one."""
        return self.is_decomposed and len(self.spec.shape) == 3

    @property
    def ranks(self) -> list[int | None]:
        """The rank of each expert's update at most; None where it is no product of factors."""
        return [source.rank_of(self.spec.name) for source in self.sources[1:]]

    @property
    def is_low_rank(self) -> bool:
        """Whether its update is one of low rank, whatever the values."""
        low = self.method.keeps_low_rank(self.weights, self.base_weight)
        return low and None not in self.ranks

    @property
    def is_factored(self) -> bool:
        """Whether a matrix is decided from factors alone: no task vector is made whole."""
        if self.factors is not None:
            return not self.reads_layout
        return self.is_decomposed and self.is_low_rank

    @property
    def is_held(self) -> bool:
        """Whether a piece is merged in one go, its output held until it is due.

        Otherwise it is decided first, and merged as it is written.
        """
        if self.rule is None or self.rule.needs_matrix or self.rule.in_pieces:
            return True
        if self.is_quantised:
            return True  # its scales come first
        return self.spec.nbytes <= HELD_BYTES

    @property
    def matrix(self) -> tuple[int, int]:
        """Rows and columns of what is merged at once."""
        m, n = self.spec.shape[1:] if self.is_stack else self.spec.matrix_shape
        return (m, n) if self.fused is None else self.fused.shape(m, n)

    @property
    def parts(self) -> int:
        """How many matrices are decomposed apart where one could be seen."""
        return 1 if self.fused is None else len(self.fused.names)

    @property
    def rows_read(self) -> int:
        """Rows (first axis) that are read at once."""
        rows, _ = self.spec.matrix_shape
        if self.factors is not None or self.is_quantised:
            return rows
        if not self.is_decomposed:
            return min(rows, rows * PIECE_BYTES // max(self.spec.nbytes, 1) + 1)
        if self.is_stack:
            return 1
        return rows if self.fused is None or self.fused.woven else self.matrix[0]


@dataclass(frozen=True, slots=True)
class TokenFiles:
    """The tokenizer's files of the output.

    Attributes:
        origin: whose files are copied.
        files: those that are written otherwise.
        left_out: names that are not copied.
        numbers: the merge's tokens, where rows are matched by token.
        ids: what ``config.json`` says otherwise of special tokens, such as ``eos_token_id``.
    """

    origin: Checkpoint
    files: Mapping[str, bytes] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()
    numbers: Mapping[str, int] = field(default_factory=dict)
    ids: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """What planning has found so far: each step makes a new one.

    It ends as a `Plan`, which can run, or as a `RefusedPlan`, which says why it cannot.
    `plan_hash` are 16 hex digits of what makes a run the same run; see `hash_of`.
    """

    recipe: Recipe
    options: Options
    method: MergeMethod | None = None
    resolver: Resolver | None = field(default=None, repr=False)
    plan_hash: str = ""
    base: Checkpoint | None = None
    experts: tuple[Checkpoint, ...] = ()
    numbers: tuple[int, ...] = ()  # of the experts, from 1; of a refused plan some may be missing
    tokenizer: Checkpoint | None = None
    speaker: Checkpoint | None = None  # opened for its generation config
    token_files: TokenFiles | None = None
    tensors: Mapping[str, PlannedTensor] = field(default_factory=dict)
    shards: tuple[Shard, ...] = ()
    left_out: Mapping[str, str] = field(default_factory=dict)
    # Of each expert: the base's tensors → what stands for them under other names, where it differs.
    matched: tuple[Mapping[str, tuple[str, ...]], ...] = ()
    warnings: tuple[Notice, ...] = ()
    machine: Machine | None = None  # where it will run; None: here
    memory_budget: int = 0
    threads: int = 1  # that may be at work at once, in the memory that is planned
    working_bytes: int = 0
    read_ahead_bytes: int = 0
    peak_memory_bytes: int = 0
    peak_disk_bytes: int = 0
    read_bytes: int = 0
    compute_seconds: float = 0.0  # on two cores, whatever the network does
    seconds_estimate: float = 0.0
    own: tuple[str, ...] | None = None  # the shards of `options.part`, by name; None: all
    config: bytes = b"{}"
    copied: Mapping[int, str] = field(default_factory=dict)  # what folders give beside weights
    publication: Publication | None = None
    update: bool = False  # whether a finished result of other sources may be replaced
    target: "HubTarget | None" = None
    token: str | bool | None = field(default=None, repr=False)

    @property
    def request(self) -> Request:
        """What was asked for."""
        return Request(recipe=self.recipe, options=self.options, publication=self.publication)

    @property
    def checkpoints(self) -> Iterator[Checkpoint]:
        """The base, then the experts."""
        if self.base is not None:
            yield self.base
        yield from self.experts

    @property
    def beside(self) -> list[Checkpoint]:
        """What is opened for small files alone."""
        return [one for one in (self.tokenizer, self.speaker) if one is not None]

    @property
    def parts(self) -> list[str]:
        """What each of the checkpoints is to the merge: ``base``, ``expert 1``, …"""
        experts = [f"expert {number}" for number in self.numbers]
        return experts if self.base is None else ["base", *experts]

    @property
    def identity(self) -> dict[str, Any]:
        """What tells the sources from others under the same names, by number."""
        sources = [*self.checkpoints, *self.beside]
        return {str(n): self._identity_of(n, one) for n, one in enumerate(sources)}

    @property
    def known(self) -> tuple[Known, ...]:
        """The sources as they are now, in the order of `identity`."""
        sources = [*self.checkpoints, *([self.tokenizer] if self.tokenizer else [])]
        return tuple(
            Known(one.id, one.revision, digest_of(self._identity_of(n, one)))
            for n, one in enumerate(sources)
        )

    def _identity_of(self, number: int, source: Checkpoint) -> dict[str, Any]:
        copied = self.copied.get(number)
        return source.identity | ({"copied": copied} if copied is not None else {})

    @property
    def name_private(self) -> bool:
        """Whether the card may name private models: nobody else sees it, or `--public` said so."""
        if self.publication is None or self.target is None:
            return False
        return self.publication.public is True or not self.target.ends_public

    @property
    def write_bytes(self) -> int:
        """Bytes of the output weight files."""
        return sum(shard.nbytes for shard in self.shards)

    @property
    def unsent_bytes(self) -> int:
        """Bytes of shards that wait on the disk at most, before they are sent to the Hub."""
        largest = max((shard.nbytes for shard in self.shards), default=0)
        allowed = self.publication.max_disk if self.publication is not None else None
        sharing = machine_share()[1] if self.machine is None else 1
        return min(2 * largest * sharing if allowed is None else allowed, self.write_bytes)

    @property
    def parameters(self) -> dict[str, Any]:
        """Every parameter, as written where it differs between tensors."""
        if self.method is None or self.resolver is None:
            return dict(self.recipe.parameters)
        return self.resolver.parameters(self.method)

    @property
    def layers(self) -> int:
        """How many blocks the model has, by its tensors' names."""
        return depth_of(self.tensors)

    def by_rule(self) -> dict[str, int]:
        """Return how many tensors each rule takes."""
        names = (t.rule.name if t.rule else "carried" for t in self.tensors.values())
        return dict(sorted(Counter(names).items()))

    def patterns(self) -> list[dict[str, Any]]:
        """Return what is done with which tensors: names with stars for numbers, and their rule.

        Settings are those that differ between tensors of the plan, each with its values.
        """
        found: dict[tuple[str, str, str], list[PlannedTensor]] = {}
        for name, tensor in self.tensors.items():
            rule, role = (tensor.rule.name, tensor.rule.role) if tensor.rule else ("carried", "")
            found.setdefault((pattern_of(name), rule, str(role)), []).append(tensor)
        every = _values(self.tensors.values())
        differ = [key for key, values in every.items() if len(values) > 1]
        return [
            {
                "pattern": pattern,
                "tensors": len(tensors),
                "rule": rule,
                "role": role or None,
                "settings": {k: v for k, v in _values(tensors).items() if k in differ},
            }
            for (pattern, rule, role), tensors in found.items()
        ]

    def told(self, problems: tuple[Notice, ...] = ()) -> dict[str, Any]:
        """Return what is known as plain data, as ``plan --json`` prints it."""
        return {
            "method": self.recipe.method,
            "chosen_by": self.recipe.chosen_by,
            "refused": bool(problems),
            "problems": list(problems),
            "warnings": list(self.warnings),
            "notices": {
                "problems": [problem.to_dict() for problem in problems],
                "warnings": [warning.to_dict() for warning in self.warnings],
            },
            "tensors": len(self.tensors),
            "by_rule": self.by_rule(),
            "patterns": self.patterns(),
            "shards": [
                {"name": shard.name, "bytes": shard.nbytes, "tensors": len(shard.tensors)}
                for shard in self.shards
            ],
            **({} if self.own is None else {"part": str(self.options.part), "own": list(self.own)}),
            "read_bytes": self.read_bytes,
            "write_bytes": self.write_bytes,
            "peak_memory_bytes": self.peak_memory_bytes,
            "peak_disk_bytes": self.peak_disk_bytes,
            "seconds_estimate": round(self.seconds_estimate, 1),
            "sources": [
                {
                    "part": part,
                    "id": source.id,
                    "revision": source.revision,
                    "subfolder": source.subfolder,
                    "bytes": sum(file.size for file in source.files),
                    "license": source.license,
                    "gated": source.gated,
                    "adapter_rank": source.rank if isinstance(source, Adapter) else None,
                }
                for part, source in zip(self.parts, self.checkpoints, strict=True)
            ],
            "plan_hash": self.plan_hash,
        }

    def close(self) -> None:
        """Close every source."""
        for source in (*self.checkpoints, *self.beside):
            source.close()


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan(Draft):
    """Everything that a merge will do. Made by `plan_merge`, run by `run_merge`.

    A plan that exists can run: its models are open, its method is known, nothing refuses it.
    """

    method: MergeMethod
    refused: ClassVar[bool] = False
    problems: ClassVar[tuple[Notice, ...]] = ()

    @classmethod
    def of(cls, draft: Draft, method: MergeMethod) -> Self:
        """Return the plan of a draft whose models are all open."""
        return cls(**_values_of(draft) | {"method": method})

    def accepted(self) -> Self:
        """Return this plan; a refused one raises here."""
        return self

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as plain data, as ``plan --json`` prints it."""
        return self.told()

    @property
    def layout(self) -> Checkpoint:
        """The checkpoint whose names and shapes the output has: the base, else the first model.

        Task vectors are differences to it.
        """
        return self.experts[0] if self.base is None else self.base

    def written_in(self, shard: Shard) -> list[PlannedTensor]:
        """Return what is merged for a shard, in the order of the file."""
        if self.options.output == "model":
            return [self.tensors[s.name] for s in shard.tensors if s.name in self.tensors]
        factored = {t.factors.down.name: t for t in self.tensors.values() if t.factors is not None}
        return [factored[spec.name] for spec in shard.tensors if spec.name in factored]

    def side_files(self) -> dict[str, bytes]:
        """Return the small output files that do not depend on the merge, by name."""
        if self.options.output == "adapter":
            return {ADAPTER_CONFIG: self.config}
        tokens = self.token_files or TokenFiles(self.tokenizer or self.layout)
        files = side_files(self.layout, tokens.origin)
        files = {name: data for name, data in files.items() if name not in tokens.left_out}
        files |= tokens.files
        files["config.json"] = self.config
        if len(self.shards) > 1:
            files["model.safetensors.index.json"] = index_json(self.shards)
        return files


@dataclass(frozen=True, slots=True, kw_only=True)
class RefusedPlan(Draft):
    """Why a merge cannot be, and what planning had found until then."""

    problems: tuple[Notice, ...]
    refused: ClassVar[bool] = True

    @classmethod
    def of(cls, draft: Draft, *problems: Notice) -> Self:
        """Return a draft as refused."""
        return cls(**_values_of(draft), problems=problems)

    def accepted(self) -> NoReturn:
        """Raise the problems as one error.

        Raises:
            PlanRefusedError: always.
        """
        raise PlanRefusedError.of(self.problems)

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain data, with the keys of a plan's."""
        return self.told(self.problems)


def _values_of(draft: Draft) -> dict[str, Any]:
    return {one.name: getattr(draft, one.name) for one in fields(Draft)}


def _values(tensors: Iterable[PlannedTensor]) -> dict[str, list[Any]]:
    """Return what each setting of some tensors is, each value once, in the tensors' order."""
    found: dict[str, dict[Any, None]] = {}
    for tensor in tensors:
        if tensor.rule is None:
            continue
        weight = type(tensor.method).weight_key
        for key, value in tensor.method.parameters().items():
            if isinstance(value, tuple):
                for number, own in zip(tensor.experts, value, strict=False):
                    found.setdefault(f"{key} of expert {number + 1}", {})[own] = None
            else:
                found.setdefault(key, {})[value] = None
        for number, own in zip(tensor.experts, tensor.weights, strict=True):
            found.setdefault(f"{weight} of expert {number + 1}", {})[own] = None
        if tensor.base_weight is not None:
            found.setdefault(f"{weight} of the first model", {})[tensor.base_weight] = None
    return {key: list(values) for key, values in found.items()}


def hash_of(draft: Draft) -> str:
    """Return 16 hex digits of what makes a run the same run: recipe, output options, version.

    Folders count by their absolute paths, parameters with the method's defaults, and of the options
    those that change the output.
    """

    def lasting(ref: ModelRef) -> str:
        folder = Path(os.path.expanduser(ref.id))
        return str(folder.resolve()) if os.path.isdir(folder) else str(ref)

    recipe = draft.recipe
    document = recipe.to_dict()
    if draft.method is not None:
        document["parameters"] = draft.parameters
    refs = [*recipe.experts, *([recipe.base] if recipe.base_listed else [])]
    for model, ref in zip(document["models"], refs, strict=True):
        if ref is not None:
            model["model"] = lasting(ref)
    if recipe.base is not None:
        document["base_model"] = lasting(recipe.base)
    text = json.dumps([document, *draft.options.to_dict().values(), __version__], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def refused_plan(*problems: Notice) -> dict[str, Any]:
    """Return what `Plan.to_dict` would, for a recipe that is none."""
    draft = Draft(recipe=Recipe(ModelRef(""), ()), options=Options())
    return {**draft.told(problems), "method": None, "chosen_by": None, "plan_hash": None}
