"""Which tensors of a base an adapter changes, and from which of its own: names, shapes, no values.

PEFT names a factor after the module it adapts (``…q_proj.lora_A.weight``). Here each becomes part
of an `Edit` of one of the base's tensors.
"""

import itertools
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import NoReturn

from ..errors import UnsupportedCheckpointError, listed, shown
from ..specs import DTYPES, TensorSpec
from .adapter_config import LoraSettings
from .checkpoint import Checkpoint
from .fused import Fused, fused_in

_FACTOR = re.compile(
    r"(?P<module>.*?)\.?(?P<kind>lora_A|lora_B|lora_embedding_A|lora_embedding_B|"
    r"lora_magnitude_vector)(?:\.default)?(?:\.(?P<end>weight|bias))?"
)
_TOKENS = re.compile(r"(?P<module>.*)\.token_adapter\.trainable_tokens_delta(?:\.default)?")
_WHOLE = re.compile(
    r"(?P<module>.*?)(?:\.modules_to_save(?:\.default)?|\.base_layer)?\.(?P<end>weight|bias)"
)
_PREFIXES = ("base_model.model.", "_fsdp_wrapped_module.")
# Names of an expert's three matrices: Mixtral's (and Tinker's) beside those of others.
_TWINS = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
_TWINS |= {new: old for old, new in _TWINS.items()}
# Layers that a trainer takes apart and a checkpoint has as one, in the order of its rows.
_PARTS = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "in_proj_qkv": ("in_proj_q", "in_proj_k", "in_proj_v"),
    "in_proj": ("gate_proj", "x_proj"),
}
_EXPERTS = ("gate_proj", "up_proj", "down_proj")
_WHOLE_MATRIX = (slice(None), slice(None))


@dataclass(frozen=True, slots=True)
class Factor:
    """One factor as it is stored.

    Attributes:
        key: its name in the adapter's file.
        transposed: whether L or R is the stored matrix's transpose.
        pick: how an expert's own matrix is found in it: ``whole`` (there is but one), ``rows``
            (E groups of rows), ``columns`` (every E-th column), ``stack`` (first axis of three).
        count: E, where there are several.
    """

    key: str
    transposed: bool
    pick: str = "whole"
    count: int = 1


@dataclass(frozen=True, slots=True)
class Term:
    """s·L·Rᵀ, added to a tensor.

    Attributes:
        scale: s.
        left: L; its rows are the tensor's rows.
        right: R; its rows are the tensor's columns.
        expert: the one matrix of the factors, or of a stack, that it is about; None for all.
        place: rows and columns that it is added to, of the tensor or of each matrix of a stack.
        source_rows: which rows of L, where not all.
    """

    scale: float
    left: Factor
    right: Factor
    expert: int | None = None
    place: tuple[slice, slice] = _WHOLE_MATRIX
    source_rows: tuple[int, int] | None = None

    @property
    def is_whole(self) -> bool:
        """Whether stored factors are about a whole matrix, and about no other."""
        is_all = self.place == _WHOLE_MATRIX and self.source_rows is None
        return is_all and self.left.pick == "whole"


@dataclass(frozen=True, slots=True)
class Edit:
    """Everything that an adapter does to one tensor of the base.

    Attributes:
        spec: the tensor, as the base has it.
        terms: low-rank updates that are added.
        bias: key of a vector and its factor, added to the tensor.
        stored: key of other values of the whole tensor.
        tokens: key of other values of some rows, and which rows.
        magnitude: key of DoRA's magnitudes, and whether they are the columns' and not the rows'.
    """

    spec: TensorSpec
    terms: tuple[Term, ...] = ()
    bias: tuple[str, float] | None = None
    stored: str | None = None
    tokens: tuple[str, tuple[int, ...]] | None = None
    magnitude: tuple[str, bool] | None = None

    @property
    def is_low_rank(self) -> bool:
        """Whether the update is given by factors alone."""
        return not (self.stored or self.tokens or self.magnitude)

    @property
    def keys(self) -> tuple[str, ...]:
        """The adapter's tensors that are read whole for this one."""
        found = [factor.key for term in self.terms for factor in (term.left, term.right)]
        found += [pair[0] for pair in (self.bias, self.tokens, self.magnitude) if pair is not None]
        return tuple(dict.fromkeys(found))

    def rank(self, ranks: Mapping[str, TensorSpec]) -> int:
        """Return the number of columns of L and R together, for one matrix of a stack.

        Args:
            ranks: the adapter's tensors by key.
        """
        stacked = len(self.spec.shape) == 3
        by_expert: dict[int | None, int] = defaultdict(int)
        for term in self.terms:
            by_expert[term.expert if stacked else None] += _rank(ranks[term.right.key], term.right)
        shared = by_expert.pop(None, 0)
        return shared + max(by_expert.values(), default=0) + (self.bias is not None)


@dataclass(slots=True)
class _Pair:
    """The tensors of one adapted module: its factors by kind."""

    keys: dict[str, str] = field(default_factory=dict)


def layout_of(
    own: Mapping[str, TensorSpec], base: Checkpoint, settings: LoraSettings, *, where: str
) -> dict[str, Edit]:
    """Return what an adapter does, by the name of the base's tensor.

    Args:
        own: the adapter's tensors by key.
        base: the checkpoint that it changes.
        settings: of the adapter.
        where: what to call the adapter in errors.

    Raises:
        UnsupportedCheckpointError: a factor is missing, fits nothing, or fits two ways.
    """
    return _Layout(own, base, settings, where).edits()


class _Layout:
    """Puts an adapter's tensors in their places."""

    def __init__(
        self,
        own: Mapping[str, TensorSpec],
        base: Checkpoint,
        settings: LoraSettings,
        where: str,
    ) -> None:
        self._own, self._checkpoint, self._settings = own, base, settings
        self._base = {name: stored.spec for name, stored in base.tensors.items()}
        self._tied = base.config.get("tie_word_embeddings") is True
        self._where = where
        self._pairs: dict[str, _Pair] = defaultdict(_Pair)
        self._edits: dict[str, Edit] = {}
        self._ends: dict[str, list[str]] = {}

    def edits(self) -> dict[str, Edit]:
        """Return all edits, in the base's order."""
        for key, spec in self._own.items():
            if not DTYPES[spec.dtype].is_merged:
                self._refuse(f"{key} holds {spec.dtype}, not floating point")
            self._sort_in(key)
        for module, pair in self._nested_last():
            self._place(module, pair)
        if not self._edits:
            self._refuse("it has no factors at all; nothing was saved")
        return {name: self._edits[name] for name in self._base if name in self._edits}

    def _sort_in(self, key: str) -> None:
        name = key
        for prefix in _PREFIXES:
            name = name.removeprefix(prefix)
        if (found := _FACTOR.fullmatch(name)) is not None:
            pair, end = self._pairs[found["module"]], found["end"]
            kind = found["kind"] + (".bias" if end == "bias" else "")
            pair.keys[kind.replace("lora_embedding_", "embedding_").replace("lora_", "")] = key
        elif (found := _TOKENS.fullmatch(name)) is not None:
            self._place_tokens(found["module"], key)
        elif (found := _WHOLE.fullmatch(name)) is not None:
            self._place_whole(f"{found['module']}.{found['end']}", key)
        else:
            self._refuse(f"it has the tensor {shown(key)}, which is not one of LoRA's")

    def _place(self, module: str, pair: _Pair) -> None:
        keys = pair.keys
        for left, right in (("A", "B"), ("embedding_A", "embedding_B")):
            if (left in keys) != (right in keys):
                there, missing = (left, right) if left in keys else (right, left)
                self._refuse(f"{module} has lora_{there} but no lora_{missing}")
        if "embedding_A" in keys:
            self._place_embedding(module, keys)
        elif "A" in keys:
            self._place_linear(module, keys)
        else:
            self._refuse(f"{module} has a {listed(keys)} but no factors")

    def _place_linear(self, module: str, keys: Mapping[str, str]) -> None:
        down, up = self._own[keys["A"]], self._own[keys["B"]]
        if len(down.shape) == 3 or len(up.shape) == 3:
            self._place_expert_stack(module, keys["A"], keys["B"])
            return
        self._check_factors(module, down, up)
        name = self._find(f"{module}.weight")
        if name is None:
            if not (self._place_part(module, keys) or self._place_parameter(module, keys)):
                self._refuse(
                    f"it adapts {shown(module)}, but the base has no {shown(module + '.weight')}"
                )
            return
        spec = self._base[name]
        if len(spec.shape) != 2:
            self._refuse(f"it adapts {name} of shape {list(spec.shape)}; only matrices are merged")
        flipped = self._is_flipped(name, down, up)
        scale = self._scale(module, down.shape[0])
        self._check_head(name)
        term = Term(
            scale,
            Factor(keys["A"] if flipped else keys["B"], flipped),
            Factor(keys["B"] if flipped else keys["A"], not flipped),
        )
        if "B.bias" in keys:
            bias = self._find(f"{module}.bias")
            if bias is None:
                self._refuse(
                    f"{module} has lora_bias, but the base has no bias there: peft cannot merge it"
                )
            self._add(bias, bias=(keys["B.bias"], scale))
        self._add(name, term=term, magnitude=self._magnitude(name, keys, columns=flipped))

    def _place_part(self, module: str, keys: Mapping[str, str]) -> bool:
        """Place factors of some rows of a layer; return whether the base has such a layer.

        How many rows the parts before have, only their own factors say.
        """
        parent, _, leaf = module.rpartition(".")
        down, up = self._own[keys["A"]], self._own[keys["B"]]
        for whole, parts in _PARTS.items():
            name = self._find(f"{parent}.{whole}.weight") if leaf in parts else None
            if name is None:
                continue
            start = 0
            for part in parts[: parts.index(leaf)]:
                before = self._pairs.get(f"{parent}.{part}")
                if before is None or "B" not in before.keys:
                    self._refuse(
                        f"it adapts {shown(module)}, which is part of {name}; without factors of "
                        f"{part}, which comes before it there, its place is not known"
                    )
                start += self._own[before.keys["B"]].shape[0]
            m, n = self._base[name].matrix_shape
            if down.shape[1] != n or start + up.shape[0] > m:
                self._refuse_shape(name, down, up)
            scale = self._scale(module, down.shape[0])
            left, right = Factor(keys["B"], False), Factor(keys["A"], True)
            place = slice(start, start + up.shape[0]), slice(None)
            self._add(name, term=Term(scale, left, right, place=place))
            return True
        return False

    def _place_embedding(self, module: str, keys: Mapping[str, str]) -> None:
        name = self._find(f"{module}.weight")
        if name is None:
            self._refuse(f"it adapts the embedding {shown(module)}, which the base lacks")
        down, up = self._own[keys["embedding_A"]], self._own[keys["embedding_B"]]
        self._check_factors(module, down, up)
        rows, columns = self._base[name].matrix_shape
        if (down.shape[1], up.shape[0]) != (rows, columns):
            self._refuse_shape(name, down, up)
        term = Term(
            self._scale(module, down.shape[0]),
            Factor(keys["embedding_A"], True),
            Factor(keys["embedding_B"], False),
        )
        self._add(name, term=term, magnitude=self._magnitude(name, keys, columns=True))

    def _place_parameter(self, module: str, keys: Mapping[str, str]) -> bool:
        """Place factors of a parameter that is adapted itself; return whether there is one.

        PEFT wraps a module once for each of its parameters, so that ``base_layer`` stands in the
        name of all but the last; which is which, the shapes tell.
        """
        outer = re.sub(r"(\.base_layer)+$", "", module)
        down, up = self._own[keys["A"]], self._own[keys["B"]]
        found = [place for place in self._stacks(outer, down, up) if place[0] not in self._edits]
        if len(found) > 1:
            self._refuse(
                f"the factors of {module} fit in more than one way "
                f"({listed(dict.fromkeys(name for name, _ in found))}), so it is not known what "
                "they change"
            )
        if not found:
            return self._place_on_experts(outer, keys)
        name, flipped = found[0]
        experts = self._base[name].shape[0]
        parts = (
            Factor(keys["B"], False, "columns", experts),
            Factor(keys["A"], True, "rows", experts),
        )
        left, right = parts[::-1] if flipped else parts
        self._add(name, term=Term(self._scale(name, down.shape[0] // experts), left, right))
        return True

    def _stacks(self, module: str, down: TensorSpec, up: TensorSpec) -> Iterator[tuple[str, bool]]:
        """Yield the stacks of a module that factors fit, and whether they do transposed."""
        short = module.removeprefix("model.")
        for name, spec in self._base.items():
            parent = name.rpartition(".")[0]
            if len(spec.shape) != 3 or not (parent == short or parent.endswith(f".{short}")):
                continue
            experts, m, n = spec.shape
            if down.shape[0] % experts or not self._is_targeted(name):
                continue
            if (up.shape[0], down.shape[1]) == (m, n):
                yield name, False
            if (down.shape[1], up.shape[0]) == (m, n):
                yield name, True

    def _is_targeted(self, name: str) -> bool:
        ends = self._settings.target_parameters
        return not ends or any(name == end or name.endswith(f".{end}") for end in ends)

    def _place_on_experts(self, module: str, keys: Mapping[str, str]) -> bool:
        """Place factors of fused experts on a base that stores each expert by itself."""
        down, up = self._own[keys["A"]], self._own[keys["B"]]
        first = self._find(f"{module}.0.down_proj.weight") or self._find(f"{module}.0.w2.weight")
        if first is None:
            return False
        n, m = self._base[first].matrix_shape
        experts = sum(
            self._expert(module, e, "down_proj") is not None for e in range(down.shape[0])
        )
        fits = {"gate_up_proj": (2 * m, n), "down_proj": (n, m)}
        leaves = [leaf for leaf, shape in fits.items() if shape == (up.shape[0], down.shape[1])]
        if len(leaves) != 1 or down.shape[0] % experts:
            return False
        [leaf] = leaves
        halves = (
            {"down_proj": None}
            if leaf == "down_proj"
            else {"gate_proj": (0, m), "up_proj": (m, 2 * m)}
        )
        scale = self._scale(f"{module}.{leaf}", down.shape[0] // experts)
        left, right = (
            Factor(keys["B"], False, "columns", experts),
            Factor(keys["A"], True, "rows", experts),
        )
        for expert in range(experts):
            for half, rows in halves.items():
                name = self._expert(module, expert, half)
                if name is None:
                    return False
                self._add(name, term=Term(scale, left, right, expert, source_rows=rows))
        return True

    def _expert(self, module: str, expert: int, leaf: str) -> str | None:
        return self._find(f"{module}.{expert}.{leaf}.weight") or self._find(
            f"{module}.{expert}.{_TWINS[leaf]}.weight"
        )

    def _place_expert_stack(self, module: str, key_down: str, key_up: str) -> None:
        """Place factors with an axis of experts, [E or 1, r, in] and [E or 1, out, r]."""
        down, up = self._own[key_down], self._own[key_up]
        if 0 in down.shape and 0 in up.shape:
            return  # a placeholder for a matrix that this architecture lacks
        if (
            len(down.shape) != 3
            or len(up.shape) != 3
            or down.shape[1] != up.shape[2]
            or 0 in down.shape
        ):
            self._refuse_pair(module, down, up)
        parent, _, leaf = module.rpartition(".")
        scale = self._scale(module, down.shape[1])
        sides = (
            Factor(key_up, False, "stack", up.shape[0]),
            Factor(key_down, True, "stack", down.shape[0]),
        )
        # Experts without a gate have w1 for what others call up_proj.
        for own in (leaf, _TWINS.get(leaf, leaf), *(("up_proj",) if leaf == "w1" else ())):
            places = list(self._experts(parent, own, up.shape[1], down.shape[2]))
            for name, expert, fused in places:
                left, right = sides[::-1] if fused is not None and fused.turned else sides
                place = _WHOLE_MATRIX
                if fused is not None:
                    number = fused.names.index(own.removesuffix("_proj"))
                    place = fused.place(number, *self._base[name].shape[1:])
                self._add(name, term=Term(scale, left, right, expert, place))
            if places:
                return
        self._refuse(f"it adapts {shown(module)}, which the base lacks or has in another shape")

    def _experts(
        self, parent: str, leaf: str, rows: int, columns: int
    ) -> Iterator[tuple[str, int | None, Fused | None]]:
        """Yield where experts' matrices lie in the base: tensor, which expert, how in a stack."""
        for expert in itertools.count():
            name = self._find(f"{parent}.{expert}.{leaf}.weight")
            if name is None:
                break
            if self._base[name].shape == (rows, columns):
                yield name, expert, None
        stack = leaf if leaf == "down_proj" else "gate_up_proj"
        name = self._find(f"{parent}.{stack}") if leaf in _EXPERTS else None
        if name is None or len(self._base[name].shape) != 3:
            return
        spec = self._base[name]
        fused = fused_in(spec, self._checkpoint.tensors, self._checkpoint.config)
        if (fused.shape(*spec.shape[1:]) if fused is not None else spec.shape[1:]) == (
            rows,
            columns,
        ):
            yield name, None, fused

    def _place_tokens(self, module: str, key: str) -> None:
        name = self._find(f"{module}.weight")
        if name is None:
            self._refuse(f"it trained tokens of {shown(module)}, which the base lacks")
        lists = self._settings.tokens
        short = module.rpartition(".")[2]
        indices = lists.get("", lists.get(module, lists.get(short, ())))
        rows, columns = self._base[name].matrix_shape
        if self._own[key].shape != (len(indices), columns) or max(indices, default=0) >= rows:
            self._refuse(
                f"{key} of shape {list(self._own[key].shape)} does not fit the {len(indices)} "
                f"trained tokens of {name}, {rows} × {columns}"
            )
        self._add(name, tokens=(key, indices))

    def _place_whole(self, wanted: str, key: str) -> None:
        name = self._find(wanted)
        if name is None:
            self._refuse(f"it brings its own {wanted}, which the base lacks")
        self._check_head(name)
        if self._own[key].shape != self._base[name].shape:
            self._refuse(
                f"it brings its own {name} of shape {list(self._own[key].shape)}, but the base's "
                f"has {list(self._base[name].shape)} (tokens were added?)"
            )
        self._add(name, stored=key)

    def _magnitude(
        self, name: str, keys: Mapping[str, str], *, columns: bool
    ) -> tuple[str, bool] | None:
        key = keys.get("magnitude_vector")
        if key is None:
            if self._settings.dora:
                self._refuse(f"it is DoRA, but has no magnitudes for {name}")
            return None
        length = self._base[name].matrix_shape[1 if columns else 0]
        if self._own[key].numel != length:
            self._refuse(f"{key} has {self._own[key].numel} magnitudes, but {name} needs {length}")
        return key, columns

    def _add(
        self,
        name: str,
        *,
        term: Term | None = None,
        bias: tuple[str, float] | None = None,
        stored: str | None = None,
        tokens: tuple[str, tuple[int, ...]] | None = None,
        magnitude: tuple[str, bool] | None = None,
    ) -> None:
        old = self._edits.get(name, Edit(self._base[name]))
        self._edits[name] = Edit(
            old.spec,
            old.terms + (() if term is None else (term,)),
            bias or old.bias,
            stored or old.stored,
            tokens or old.tokens,
            magnitude or old.magnitude,
        )

    def _check_factors(self, module: str, down: TensorSpec, up: TensorSpec) -> None:
        if len(down.shape) == len(up.shape) == 2 and down.shape[1] == up.shape[0] < min(
            down.shape[0], up.shape[1]
        ):
            self._refuse(
                f"the factors of {module} are transposed: lora_A is {list(down.shape)} and lora_B "
                f"{list(up.shape)}, not r × in and out × r"
            )
        if (
            len(down.shape) != 2
            or len(up.shape) != 2
            or down.shape[0] != up.shape[1]
            or 0 in down.shape
        ):
            self._refuse_pair(module, down, up)

    def _is_flipped(self, name: str, down: TensorSpec, up: TensorSpec) -> bool:
        """Return whether the base stores this weight transposed, (in, out)."""
        m, n = self._base[name].matrix_shape
        straight = (up.shape[0], down.shape[1]) == (m, n)
        flipped = (down.shape[1], up.shape[0]) == (m, n)
        if not straight and not flipped:
            self._refuse_shape(name, down, up)
        return self._settings.fan_in_fan_out if straight and flipped else flipped

    def _scale(self, module: str, rank: int) -> float:
        said = self._settings.rank_of(module)
        if said != rank:
            self._refuse(
                f"adapter_config.json gives {module} the rank {said}, but its factors have {rank}"
            )
        return self._settings.scale_of(module)

    def _check_head(self, name: str) -> None:
        if self._tied and name.endswith("lm_head.weight") and not self._settings.ties_embeddings:
            self._refuse(
                f"it changes {name}, which the base ties to its embedding: a tied model cannot "
                "hold that. Untie the base first, or train without the head"
            )

    def _find(self, wanted: str) -> str | None:
        """Return the base's name of a tensor, whatever stands before it there."""
        wanted = wanted.replace("unembed_tokens", "lm_head")
        if not self._ends:
            self._ends = _by_end(self._base)
        # Tinker calls gpt-oss's attention ``attn``.
        for asked in dict.fromkeys((wanted, wanted.replace(".attn.", ".self_attn."))):
            short = asked.removeprefix("model.")
            for name in (asked, f"model.{asked}", short):
                if name in self._base:
                    return name
            found = self._ends.get(short, [])
            if len(found) == 1:
                return found[0]
        return None

    def _nested_last(self) -> list[tuple[str, _Pair]]:
        """Return the modules, those that stand inside a wrapper first."""
        return sorted(self._pairs.items(), key=lambda item: -item[0].count(".base_layer"))

    def _refuse_shape(self, name: str, down: TensorSpec, up: TensorSpec) -> NoReturn:
        m, n = self._base[name].matrix_shape
        self._refuse(
            f"the factors of {name} are {list(up.shape)} and {list(down.shape)}, but the base's is "
            f"{m} × {n}: the adapter was trained on another base"
        )

    def _refuse_pair(self, module: str, down: TensorSpec, up: TensorSpec) -> NoReturn:
        self._refuse(
            f"lora_A {list(down.shape)} and lora_B {list(up.shape)} of {module} do not fit "
            "together; they should be r × in and out × r (was it saved from one shard of several?)"
        )

    def _refuse(self, problem: str) -> NoReturn:
        raise UnsupportedCheckpointError(f"the adapter {self._where!r} cannot be read: {problem}.")


def _by_end(base: Mapping[str, TensorSpec]) -> dict[str, list[str]]:
    """Return the base's names by every part that they end with."""
    found: dict[str, list[str]] = defaultdict(list)
    for name in base:
        parts = name.split(".")
        for start in range(1, len(parts)):
            found[".".join(parts[start:])].append(name)
    return found


def _rank(spec: TensorSpec, factor: Factor) -> int:
    """Return r of the right factor."""
    if factor.pick == "stack":
        return spec.shape[1] if factor.transposed else spec.shape[2]
    if factor.pick == "rows":
        return spec.shape[0] // factor.count
    if factor.pick == "columns":
        return spec.shape[1] // factor.count
    return spec.shape[0] if factor.transposed else spec.shape[1]
