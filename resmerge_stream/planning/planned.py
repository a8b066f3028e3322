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
from ..memory import HELD_BYTES, PIECE_BYTES, block_bytes, matrix_bytes, solver_bytes
from ..methods import MergeMethod, Rule
from ..recipe import ModelRef, Recipe
from ..roles import layer_of, pattern_of
from ..sinks.layout import Shard, index_json
from ..sinks.publication import Publication
from ..sources import Checkpoint
from ..sources.adapter import rank_of
from ..sources.adapter_config import CONFIG as ADAPTER_CONFIG
from ..sources.fused import Fused
from ..sources.view import made_bytes
from ..specs import DTYPES, TensorSpec
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
        resident: whether float32 task vectors of all experts are kept at once.
        factors: what is written instead of the tensor, where the output is an adapter.
        reads_layout: whether the values of the layout's model are read.
    """

    spec: TensorSpec
    rule: Rule | None
    method: MergeMethod
    experts: tuple[int, ...] = ()
    weights: tuple[float, ...] = ()
    base_weight: float | None = None
    fused: Fused | None = None
    resident: bool = True
    factors: OutputFactors | None = None
    reads_layout: bool = True

    @property
    def stored(self) -> tuple[TensorSpec, ...]:
        """What is written of it, in the order of the file."""
        return (self.spec,) if self.factors is None else (self.factors.down, self.factors.up)

    @property
    def output_bytes(self) -> int:
        """Bytes that are written of it."""
        return sum(spec.nbytes for spec in self.stored)

    @property
    def is_stack(self) -> bool:
        """Whether its matrices [E, m, n] are decomposed one by one."""
        return self.rule is not None and self.rule.needs_matrix and len(self.spec.shape) == 3

    @property
    def matrix(self) -> tuple[int, int]:
        """Rows and columns of what is merged at once."""
        m, n = self.spec.shape[1:] if len(self.spec.shape) == 3 else self.spec.matrix_shape
        return (m, n) if self.fused is None else self.fused.shape(m, n)

    @property
    def parts(self) -> int:
        """How many matrices are decomposed apart where one could be seen."""
        return 1 if self.fused is None else len(self.fused.names)

    @property
    def rows_read(self) -> int:
        """Rows (first axis) that are read at once."""
        rows, _ = self.spec.matrix_shape
        if self.factors is not None:
            return rows
        if self.rule is None or not self.rule.needs_matrix:
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
    """

    origin: Checkpoint
    files: Mapping[str, bytes] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """What planning has found so far: each step makes a new one.

    It ends as a `Plan`, which can run, or as a `RefusedPlan`, which says why it cannot.
    """

    recipe: Recipe
    options: Options
    method: MergeMethod | None = None
    base: Checkpoint | None = None
    experts: tuple[Checkpoint, ...] = ()
    tokenizer: Checkpoint | None = None
    token_files: TokenFiles | None = None
    tensors: Mapping[str, PlannedTensor] = field(default_factory=dict)
    shards: tuple[Shard, ...] = ()
    left_out: Mapping[str, str] = field(default_factory=dict)
    # Of each expert: the base's tensors → what stands for them under other names, where it differs.
    matched: tuple[Mapping[str, tuple[str, ...]], ...] = ()
    warnings: tuple[Notice, ...] = ()
    machine: Machine | None = None  # where it will run; None: here
    memory_budget: int = 0
    working_bytes: int = 0
    read_ahead_bytes: int = 0
    peak_memory_bytes: int = 0
    peak_disk_bytes: int = 0
    read_bytes: int = 0
    compute_seconds: float = 0.0  # on two cores, whatever the network does
    seconds_estimate: float = 0.0
    config: bytes = b"{}"
    publication: Publication | None = None
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
    def parts(self) -> list[str]:
        """What each of the checkpoints is to the merge: ``base``, ``expert 1``, …"""
        experts = [f"expert {number}" for number in range(1, len(self.experts) + 1)]
        return experts if self.base is None else ["base", *experts]

    @property
    def identity(self) -> dict[str, Any]:
        """What tells the sources from others under the same names, by number."""
        sources = [*self.checkpoints, *([self.tokenizer] if self.tokenizer else [])]
        return {str(number): source.identity for number, source in enumerate(sources)}

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
    def weights(self) -> tuple[float, ...]:
        """The experts' factors, 1.0 where none was given."""
        return tuple(1.0 if ref.weight is None else ref.weight for ref in self.recipe.experts)

    @property
    def parameters(self) -> dict[str, Any]:
        """Every parameter, as written where it differs between tensors."""
        if self.method is None:
            return dict(self.recipe.parameters)
        return Resolver(self.recipe).parameters(self.method)

    @property
    def layers(self) -> int:
        """How many blocks the model has, by its tensors' names."""
        numbers = [layer_of(name) for name in self.tensors]
        return 1 + max((number for number in numbers if number is not None), default=-1)

    @property
    def plan_hash(self) -> str:
        """16 hex digits of what makes a run the same run: recipe, output options, version."""
        recipe = self.recipe.to_dict()
        refs = [*self.recipe.experts, *([self.recipe.base] if self.recipe.base_listed else [])]
        for model, ref in zip(recipe["models"], refs, strict=True):
            if ref is not None:
                model["model"] = _lasting_name(ref)
        if self.recipe.base is not None:
            recipe["base_model"] = _lasting_name(self.recipe.base)
        if self.method is not None:
            recipe["parameters"] = self.parameters
        key = [recipe, *self.options.to_dict().values(), __version__]
        text = json.dumps(key, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

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
                }
                for part, source in zip(self.parts, self.checkpoints, strict=True)
            ],
            "plan_hash": self.plan_hash,
        }

    def close(self) -> None:
        """Close every source."""
        for source in (*self.checkpoints, *((self.tokenizer,) if self.tokenizer else ())):
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

    def sources_of(self, tensor: PlannedTensor) -> list[Checkpoint]:
        """Return what is read for a tensor: the layout, then the experts that take part."""
        if tensor.rule is None:
            return [self.layout]
        return [self.layout, *(self.experts[i] for i in tensor.experts)]

    def read_for(self, tensor: PlannedTensor) -> list[Checkpoint]:
        """Return the sources of a tensor whose values are read."""
        return self.sources_of(tensor)[0 if tensor.reads_layout else 1 :]

    def written_in(self, shard: Shard) -> list[PlannedTensor]:
        """Return what is merged for a shard, in the order of the file."""
        if self.options.output == "model":
            return [self.tensors[spec.name] for spec in shard.tensors]
        factored = {t.factors.down.name: t for t in self.tensors.values() if t.factors is not None}
        return [factored[spec.name] for spec in shard.tensors if spec.name in factored]

    def working_bytes_of(self, tensor: PlannedTensor) -> int:
        """Return bytes of float32 memory that are held while a tensor's piece is in work."""
        m, n = tensor.matrix
        count = len(tensor.experts)
        if tensor.rule is None:
            return 0
        block = block_bytes(count, m, n) + self.made_bytes_of(tensor)
        if tensor.factors is not None:
            return self._factoring_bytes(tensor)
        output = m * n * DTYPES[tensor.spec.dtype].nbytes
        if tensor.fused is not None and not tensor.fused.in_rows:
            output *= 1 + 2 * tensor.parts  # they wait for each other, and are woven
            if tensor.fused.turned:  # every model's matrix, as its own layer would store it
                stored = [source.tensors[tensor.spec.name] for source in self.read_for(tensor)]
                output += m * n * sum(DTYPES[one.spec.dtype].nbytes for one in stored)
        if self.is_factored(tensor):
            return block + output + self._factoring_bytes(tensor)
        if not tensor.rule.needs_matrix:
            held = PIECE_BYTES if tensor.rule.in_pieces else HELD_BYTES
            return block + (min(output, held) if self.is_held(tensor) else 0)
        scratch = tensor.method.scratch_bytes(m, n, count)
        return block + output + matrix_bytes(m, n, count, scratch, resident=tensor.resident)

    def is_factored(self, tensor: PlannedTensor) -> bool:
        """Return whether a matrix is decided from factors alone: no task vector is made whole."""
        if tensor.factors is not None:
            return not tensor.reads_layout
        if tensor.rule is None or not tensor.rule.needs_matrix:
            return False
        ranks = [rank_of(self.experts[i], tensor.spec.name) for i in tensor.experts]
        low = tensor.method.keeps_low_rank(tensor.weights, tensor.base_weight)
        return None not in ranks and low

    def made_bytes_of(self, tensor: PlannedTensor) -> int:
        """Return bytes of one piece that are made when it is read: dequantised, or put together."""
        rows = tensor.rows_read
        name = tensor.spec.name
        return sum(made_bytes(source, name, 0, rows) for source in self.read_for(tensor))

    def _factoring_bytes(self, tensor: PlannedTensor) -> int:
        """Return bytes that are held while a tensor's update becomes factors."""
        m, n = tensor.matrix if tensor.factors is None else tensor.spec.matrix_shape
        count = len(tensor.experts)
        ranks = [rank_of(self.experts[i], tensor.spec.name) for i in tensor.experts]
        # Factors as read, orthonormal, and twice as the update's: float64 but the first. Once more
        # for what the C library keeps of them for the next matrix.
        held = (m + n) * sum(rank or 0 for rank in ranks) * (4 + 8 + 2 * 8 + 8 + 8)
        if tensor.reads_layout and tensor.factors is not None:
            # The update whole, and its decomposition.
            held += block_bytes(count, m, n) + self.made_bytes_of(tensor)
            held += 4 * m * n + solver_bytes(m, n, tensor.factors.rank, "auto")
            if tensor.rule is not None and tensor.rule.needs_matrix:
                scratch = tensor.method.scratch_bytes(m, n, count)
                held += matrix_bytes(m, n, count, scratch, resident=tensor.resident)
        return held

    def is_held(self, tensor: PlannedTensor) -> bool:
        """Return whether a piece of a tensor is merged in one go, its output held until it is due.

        Otherwise it is decided first, and merged as it is written.
        """
        rule = tensor.rule
        if rule is None or rule.needs_matrix or rule.in_pieces:
            return True
        return tensor.spec.nbytes <= HELD_BYTES

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


def _lasting_name(ref: ModelRef) -> str:
    """Return a folder's absolute path, so that the working directory does not matter."""
    folder = Path(os.path.expanduser(ref.id))
    return str(folder.resolve()) if os.path.isdir(folder) else str(ref)


def refused_plan(*problems: Notice) -> dict[str, Any]:
    """Return what `Plan.to_dict` would, for a recipe that is none."""
    draft = Draft(recipe=Recipe(ModelRef(""), ()), options=Options())
    return {**draft.told(problems), "plan_hash": None}
