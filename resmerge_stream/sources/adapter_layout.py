"""Which tensors of a base an adapter changes, and from which of its own: names, shapes, no values.

PEFT names a factor after the module it adapts (``…q_proj.lora_A.weight``). Here each becomes part
of an `Edit` of one of the base's tensors.
"""

import itertools
import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn

from ..errors import Remedy, UnsupportedCheckpointError, listed, shown
from ..roles import Role, role_of
from ..specs import DTYPES, TensorSpec
from .adapter_config import LoraSettings
from .assembly import Source, Stored
from .checkpoint import Checkpoint, same_values
from .fused import Fused, fused_in
from .runtime import (
    NotKnownError,
    Span,
    leaves_of,
    model_types,
    plain_name,
    runtime_name,
    runtime_tensors,
    transforms_of,
)
from .tables import embedding_of, is_tied

_FACTOR = re.compile(
    r"(?P<module>.*?)\.?(?P<kind>lora_A|lora_B|lora_embedding_A|lora_embedding_B|"
    r"lora_magnitude_vector)(?:\.default)?(?:\.(?P<end>weight|bias))?"
)
_TOKENS = re.compile(r"(?P<module>.*)\.token_adapter\.trainable_tokens_delta(?:\.default)?")
_WHOLE = re.compile(
    r"(?P<module>.*?)(?:\.modules_to_save(?:\.default)?|\.base_layer)?\.(?P<end>weight|bias)"
)
# What trainers, compilers and PEFT itself put around a model or a module of it, once or twice.
_AROUND = re.compile(
    r"^(?:(?:module|base_model\.model|pretrained_model|actor)\.)+|"
    r"(?<![^.])(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
)
# The base's own copy of what is saved beside it; the value head of a trainer, which no merge has.
_COPY, _VALUE_HEAD = ".original_module.", "v_head."
_UNTIE = (
    "Untie the base first: store a copy of its embedding as {}, and set tie_word_embeddings to "
    "false in its config.json"
)
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
_HEADS, _TABLES = ("lm_head.weight", "unembed_tokens.weight"), (Role.EMBEDDING, Role.HEAD)
_ALL = slice(None)
_WHOLE_MATRIX = (_ALL, _ALL)
# What PEFT took for the inputs of a stack of matrices (experts, a, b) changed twice: see `_turned`.
_SWAPPED_SINCE, _AS_STORED_BEFORE = (0, 19, 1), (0, 19, 0)
# Types of models whose layers are Conv1D of transformers, stored (in, out): PEFT calls that
# fan_in_fan_out.
CONV1D = frozenset({"gpt2", "imagegpt", "decision_transformer", "openai-gpt"})
# Architectures whose experts say in transformers that they are (experts, in, out).
_TRANSPOSED = frozenset({"gpt_oss", "aria", "aria_text", "openai_privacy_filter"})


@dataclass(frozen=True, slots=True)
class Factor:
    """One factor as it is stored.

    Attributes:
        key: its name in the adapter's file.
        transposed: whether L or R is the stored matrix's transpose.
        pick: how an expert's own matrix is found in it: ``whole`` (there is but one), ``rows``
            (E groups of rows), ``columns`` (every E-th column), ``stack`` (first axis of three).
        count: E, where there are several.
        rows: which of an expert's rows, of the matrix that is picked and turned.
    """

    key: str
    transposed: bool
    pick: str = "whole"
    count: int = 1
    rows: slice = field(default_factory=lambda: _ALL)


@dataclass(frozen=True, slots=True)
class Term:
    """s·L·Rᵀ, added to a tensor.

    Attributes:
        scale: s.
        left: L; its rows are the tensor's rows.
        right: R; its rows are the tensor's columns.
        expert: the one matrix of the factors, or of a stack, that it is about; None for all.
        place: rows and columns that it is added to, of the tensor or of each matrix of a stack.
    """

    scale: float
    left: Factor
    right: Factor
    expert: int | None = None
    place: tuple[slice, slice] = _WHOLE_MATRIX

    @property
    def is_whole(self) -> bool:
        """Whether stored factors are about a whole matrix, and about no other."""
        is_all = self.place == (self.left.rows, self.right.rows) == _WHOLE_MATRIX
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


@dataclass(frozen=True, slots=True)
class Layout:
    """What an adapter does.

    Attributes:
        edits: by the name of the base's tensor, in the base's order.
        notes: what a user should know of them.
    """

    edits: Mapping[str, Edit]
    notes: tuple[str, ...]


def layout_of(own: Checkpoint, base: Checkpoint, settings: LoraSettings) -> Layout:
    """Return what an adapter does to a base.

    Args:
        own: the adapter; read only where a tied base needs its tables to be equal.
        base: the checkpoint that it changes.
        settings: of the adapter.

    Raises:
        UnsupportedCheckpointError: a factor is missing, fits nothing, or fits two ways.
    """
    return _Layout(own, base, settings).layout()


class _Layout:
    """Puts an adapter's tensors in their places."""

    def __init__(self, own: Checkpoint, base: Checkpoint, settings: LoraSettings) -> None:
        self._adapter, self._checkpoint, self._settings = own, base, settings
        self._own = {key: stored.spec for key, stored in own.tensors.items()}
        self._base = {name: stored.spec for name, stored in base.tensors.items()}
        self._where = own.id
        self._pairs: dict[str, dict[str, str]] = defaultdict(dict)  # factors by module and kind
        self._edits: dict[str, Edit] = {}
        self._ends: dict[str, list[str]] = {}
        self._still: list[str] = []  # modules whose scale is 0
        self._notes: list[str] = []
        self._runtime: dict[str, Source] | None = None
        self._transforms: list[Any] = []
        self._done: set[str] = set()  # parameters whose factors are placed
        self._turns: set[bool] = set()  # which ways the stacks lie whose shapes say it

    def layout(self) -> Layout:
        """Return it all."""
        values: dict[str, str] = {}
        for key, spec in self._own.items():
            name = _AROUND.sub("", key)
            if not key.isprintable():
                self._refuse(f"it has the tensor {shown(key)}, which is no module's name")
            if _COPY in name:
                continue
            if name.startswith(_VALUE_HEAD):
                self._notes.append(f"{key} of {self._where} is left out: a base has no value head")
                continue
            if not DTYPES[spec.dtype].is_merged:
                self._refuse(f"{key} holds {spec.dtype}, not floating point")
            self._sort_in(name, key, values)
        # More modules than a base can have are refused before each is looked for under its names.
        rows = sum(math.prod(spec.shape[:-1]) for spec in self._base.values())
        if len(self._pairs) > rows:
            self._refuse(
                f"it adapts {len(self._pairs):,} modules, and all of the base's tensors have "
                f"{rows:,} rows: it was trained on another base"
            )
        self._settle_tied(values)
        for name, key in values.items():
            self._place_whole(name, key)
        inner_first = sorted(self._pairs, key=lambda module: -module.count(".base_layer"))
        for module in [module for module in inner_first if not self._place(module)]:
            self._place(module, is_last=True)
        if not self._edits:
            self._refuse("it has no factors at all; nothing was saved")
        if self._still and self._settings.alpha == 0:
            self._refuse(
                f"lora_alpha is 0 in its adapter_config.json, so that the factors of "
                f"{listed(self._still, limit=2)} add nothing. No trainer means that, but some "
                "write it: set lora_alpha there to the value of the training (often r, or 2·r)"
            )
        if self._still:
            self._notes.append(
                f"{self._where}: alpha_pattern is 0 for {listed(self._still, limit=2)}, whose "
                "factors add nothing, as in PEFT"
            )
        edits = {name: self._edits[name] for name in self._base if name in self._edits}
        return Layout(edits, tuple(self._notes))

    def _sort_in(self, name: str, key: str, values: dict[str, str]) -> None:
        if (found := _FACTOR.fullmatch(name)) is not None:
            pair, end = self._pairs[found["module"]], found["end"]
            kind = found["kind"] + (".bias" if end == "bias" else "")
            kind = kind.replace("lora_embedding_", "embedding_").replace("lora_", "")
            if kind in pair:
                self._refuse(f"{pair[kind]} and {key} are factors of one module")
            pair[kind] = key
        elif (found := _TOKENS.fullmatch(name)) is not None:
            self._place_tokens(found["module"], key)
        elif (found := _WHOLE.fullmatch(name)) is not None:
            wanted = f"{found['module']}.{found['end']}"
            if wanted in values:
                self._refuse(f"{values[wanted]} and {key} are values of one tensor")
            values[wanted] = key
        else:
            self._refuse(f"it has the tensor {shown(key)}, which is not one of LoRA's")

    def _settle_tied(self, values: dict[str, str]) -> None:
        """Answer for a base whose head is its embedding: what changes one changes both.

        PEFT trains them apart unless it is told otherwise (``ensure_weight_tying``).
        """
        heads = [name for name in values if self._is_head(name)]
        tables = [
            name
            for name in values
            if role_of(name, self._own[values[name]].shape) is Role.EMBEDDING
        ]
        adapted = [m for m in self._pairs if self._is_head(f"{m}.weight")]
        inputs = [m for m, pair in self._pairs.items() if "embedding_A" in pair]
        if not (heads or tables or adapted or inputs) or not _is_tied(self._checkpoint):
            return
        for head in heads:
            if len(tables) != 1 or not same_values(self._adapter, values[head], values[tables[0]]):
                self._refuse(
                    f"it brings its own {head}, which the base ties to its embedding: a tied model "
                    f"cannot hold a head of its own. {_UNTIE.format(head)}"
                )
            del values[head]
        for module in adapted:
            if not self._settings.ties_embeddings or len(inputs) != 1:
                self._refuse(
                    f"it adapts {module}, which the base ties to its embedding: a tied model "
                    f"cannot hold a head of its own. {_UNTIE.format(f'{module}.weight')}, or train "
                    "without the head"
                )
            del self._pairs[module]
        if self._settings.ties_embeddings:
            return
        if tables and not heads and ".base_layer." not in values[tables[0]]:
            self._refuse(
                f"it brings its own {tables[0]} and no head, while the base ties its head to that "
                f"table: the head would move with it, and in training it did not. "
                f"{_UNTIE.format('lm_head.weight')}"
            )
        for module in inputs:
            self._notes.append(
                f"{self._where} adapts {module}, and the base ties its head to it: merged, both "
                "move, as in peft's own merge; in training only the embedding did"
            )

    def _is_head(self, name: str) -> bool:
        """Return whether a name is that of a head that a tied base has no tensor for, or a copy."""
        if name.endswith(_HEADS):
            return True
        return role_of(name, (1, 1)) is Role.HEAD and self._find(name) is None

    def _place(self, module: str, *, is_last: bool = False) -> bool:
        """Place a module's factors; return whether their place is known by now."""
        keys = self._pairs[module]
        for left, right in (("A", "B"), ("embedding_A", "embedding_B")):
            if (left in keys) != (right in keys):
                there, missing = (left, right) if left in keys else (right, left)
                self._refuse(f"{module} has lora_{there} but no lora_{missing}")
        if "embedding_A" in keys:
            self._place_embedding(module, keys)
        elif "A" in keys:
            return self._place_linear(module, keys, is_last)
        else:
            self._refuse(f"{module} has a {listed(keys)} but no factors")
        return True

    def _place_linear(self, module: str, keys: Mapping[str, str], is_last: bool) -> bool:
        down, up = self._own[keys["A"]], self._own[keys["B"]]
        if len(down.shape) > 3 and self._place_convolution(module, keys):
            return True
        if len(down.shape) == 3 or len(up.shape) == 3:
            self._place_expert_stack(module, keys["A"], keys["B"])
            return True
        self._check_factors(module, down, up)
        tree = self._tree(f"{module}.weight")
        if tree is None:
            if self._place_part(module, keys):
                return True
            return self._place_parameter(module, keys, is_last)
        if len(tree.shape) != 2:
            self._refuse(
                f"it adapts {module} of shape {list(tree.shape)}; only matrices are merged"
            )
        flipped = self._is_flipped(module, tree.shape, down, up)
        scale = self._scale(module, down.shape[0])
        self._put(
            module,
            tree,
            scale,
            Factor(keys["A"] if flipped else keys["B"], flipped),
            Factor(keys["B"] if flipped else keys["A"], not flipped),
        )
        if "B.bias" in keys:
            bias = self._stored(f"{module}.bias")
            if bias is None:
                self._refuse(
                    f"{module} has lora_bias, but the base has no bias there: peft cannot merge it"
                )
            self._add(bias, bias=(keys["B.bias"], scale))
        if self._settings.dora or "magnitude_vector" in keys:
            name = self._stored(f"{module}.weight")
            if name is None:
                self._refuse(f"it is DoRA, and the base stores {module} together with others")
            self._add(name, magnitude=self._magnitude(name, keys, columns=flipped))
        return True

    def _place_convolution(self, module: str, keys: Mapping[str, str]) -> bool:
        """Place factors of a convolution, B of size 1: a product of matrices, rows by the rest."""
        down, up, name = (
            self._own[keys["A"]],
            self._own[keys["B"]],
            self._stored(f"{module}.weight"),
        )
        if name is None or "magnitude_vector" in keys or "B.bias" in keys:
            return False
        rows, *rest = self._base[name].shape
        if down.shape[1:] != tuple(rest) or up.shape != (rows, down.shape[0], *[1] * len(rest[1:])):
            return False
        scale = self._scale(module, down.shape[0])
        self._add(name, term=Term(scale, Factor(keys["B"], False), Factor(keys["A"], True)))
        return True

    def _put(self, module: str, tree: Source, scale: float, left: Factor, right: Factor) -> None:
        """Add s·L·Rᵀ to a runtime tensor, or to each matrix of one: where its parts are stored."""
        sides = dict(zip(range(len(tree.shape))[-2:], (left, right), strict=True))
        try:
            leaves = list(leaves_of(tree))
        except NotKnownError as exc:
            self._refuse(f"the base stores {module} in a form that is not taken apart ({exc})")
        for leaf in leaves:
            # No matrix, or a stack of others than the factors' own.
            axes = len(tree.shape)
            shape = self._base[leaf.name].shape
            own = [span.axis for span in leaf.spans]
            is_stack = own[:-2] == [0] and leaf.spans[0] == Span(0, shape[0])
            if sorted(own[-2:]) != [axes - 2, axes - 1] or not (len(own) == 2 or is_stack):
                self._refuse(f"it adapts {module}, which the base stores otherwise, as {leaf.name}")
            m, n = self._base[leaf.name].shape[-2:]
            of = [
                replace(sides[span.axis], rows=_slice(span, tree.shape[span.axis]))
                for span in leaf.spans[-2:]
            ]
            rows, columns = (
                _slice(replace(span, row=span.place, row_step=span.step), size)
                for span, size in zip(leaf.spans[-2:], (m, n), strict=True)
            )
            self._add(leaf.name, term=Term(scale, of[0], of[1], leaf.index, (rows, columns)))

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
                before = self._pairs.get(f"{parent}.{part}", {})
                if "B" not in before:
                    self._refuse(
                        f"it adapts {shown(module)}, which is part of {name}; without factors of "
                        f"{part}, which comes before it there, its place is not known"
                    )
                start += self._own[before["B"]].shape[0]
            m, n = self._base[name].matrix_shape
            if down.shape[1] != n or start + up.shape[0] > m:
                self._refuse_shape(name, (m, n), down, up)
            scale = self._scale(module, down.shape[0])
            left, right = Factor(keys["B"], False), Factor(keys["A"], True)
            place = slice(start, start + up.shape[0]), slice(None)
            self._add(name, term=Term(scale, left, right, place=place))
            return True
        return False

    def _place_embedding(self, module: str, keys: Mapping[str, str]) -> None:
        name = self._stored(f"{module}.weight")
        if name is None:
            self._refuse(f"it adapts the embedding {shown(module)}, which the base lacks")
        down, up = self._own[keys["embedding_A"]], self._own[keys["embedding_B"]]
        self._check_factors(module, down, up)
        rows, columns = self._base[name].matrix_shape
        if (down.shape[1], up.shape[0]) != (rows, columns):
            self._refuse_shape(name, (rows, columns), down, up)
        term = Term(
            self._scale(module, down.shape[0]),
            Factor(keys["embedding_A"], True),
            Factor(keys["embedding_B"], False),
        )
        self._add(name, term=term, magnitude=self._magnitude(name, keys, columns=True))

    def _place_parameter(self, module: str, keys: Mapping[str, str], is_last: bool) -> bool:
        """Place factors of a parameter that is adapted itself; return whether it is known which.

        PEFT wraps a module once for each of its parameters, so that ``base_layer`` stands in the
        name of all but the last; which is which, the shapes tell.
        """
        outer = re.sub(r"(\.base_layer)+$", "", module)
        down, up = self._own[keys["A"]], self._own[keys["B"]]
        found = [place for place in self._parameters(outer, down, up) if place[0] not in self._done]
        is_sure = len(found) == 1
        if len(found) > 1:
            # What others show counts for more than the release: it comes first.
            turned = self._turned() if is_last or self._turns else None
            found = [place for place in found if turned in (None, place[2])]
        if not found:
            self._refuse(
                f"it adapts {shown(outer)}, but the base has no {shown(outer + '.weight')}"
            )
        if len(found) > 1:
            if not is_last:
                return False
            names = list(dict.fromkeys(name for name, _, _ in found))
            self._refuse(
                f"the factors of {module} fit in more than one way ({listed(names)}), so it is not "
                "known what they change. "
                + (
                    "Say in its adapter_config.json which release of peft made it (peft_version), "
                    "which tells"
                    if len(names) == 1
                    else "Merge it into its base with peft (merge_and_unload), and give that model"
                )
            )
        name, tree, turned = found[0]
        self._done.add(name)
        if is_sure:
            self._turns.add(turned)
        experts = tree.shape[0] if len(tree.shape) == 3 else 1
        parts = (
            Factor(keys["B"], False, "columns", experts),
            Factor(keys["A"], True, "rows", experts),
        )
        left, right = parts[::-1] if turned else parts
        self._put(name, tree, self._scale(name, down.shape[0] // experts), left, right)
        return True

    def _parameters(
        self, module: str, down: TensorSpec, up: TensorSpec
    ) -> Iterator[tuple[str, Source, bool]]:
        """Yield the parameters of a module that factors fit, and whether they do transposed."""
        for name, tree in self._tensors_in(module):
            experts = tree.shape[0] if len(tree.shape) == 3 else 1
            if len(tree.shape) not in (2, 3) or down.shape[0] % experts:
                continue
            parts = name.split(".")
            ends = (".".join(parts[start:]) for start in range(len(parts)))
            targets = self._settings.target_parameters
            if targets and not any(end in targets for end in ends):
                continue
            m, n = tree.shape[-2:]
            if (up.shape[0], down.shape[1]) == (m, n):
                yield name, tree, False
            if (down.shape[1], up.shape[0]) == (m, n) and len(tree.shape) == 3:
                yield name, tree, True

    def _tensors_in(self, module: str) -> Iterator[tuple[str, Source]]:
        """Yield a module's own tensors, as they are in memory: name and tree."""
        runtime = self._in_memory()
        for named in (module, runtime_name(f"{module}.", self._transforms)[:-1]):
            inner = plain_name(f"{named}.")
            found = [name for name in runtime if name.rpartition(".")[0] + "." == inner]
            if found:
                yield from ((f"{module}.{n.rpartition('.')[2]}", runtime[n]) for n in found)
                return

    def _turned(self) -> bool | None:
        """Return whether factors of stacks are those of the transposed matrices; None: unknown.

        As others of the adapter show by their shapes; or by the release that made them. PEFT
        takes A for the inputs' side, and reads a stack as (experts, out, in) unless its module says
        that it is transposed; as (experts, in, out) always before 0.19.0, and the other way round
        in 0.19.0.
        """
        if len(self._turns) == 1:
            return True in self._turns
        made_by = self._settings.peft_version
        if made_by is None:
            return None
        if made_by < _AS_STORED_BEFORE:
            return True
        is_transposed = not _TRANSPOSED.isdisjoint(model_types(self._checkpoint.config))
        return is_transposed is (made_by >= _SWAPPED_SINCE)

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
        name = self._stored(f"{module}.weight")
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
        name = self._stored(wanted)
        if name is None:
            self._refuse(f"it brings its own {wanted}, which the base lacks")
        ours, theirs = self._own[key].shape, self._base[name].shape
        if ours != theirs and ours[1:] == theirs[1:] and role_of(name, theirs) in _TABLES:
            self._refuse(
                f"it brings its own {name} of shape {list(ours)}, but the base's has {list(theirs)}"
                ": tokens were added, or the table was cut. Merge it into its base with peft "
                "(resize_token_embeddings, merge_and_unload, save_pretrained with the tokenizer), "
                "and give that model",
                Remedy.MATCH_TOKENS,
            )
        if ours != theirs:
            self._refuse(
                f"it brings its own {name} of shape {list(ours)}, but the base's has {list(theirs)}"
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

    def _is_flipped(
        self, module: str, shape: tuple[int, ...], down: TensorSpec, up: TensorSpec
    ) -> bool:
        """Return whether a weight is stored transposed, (in, out)."""
        m, n = shape
        straight = (up.shape[0], down.shape[1]) == (m, n)
        flipped = (down.shape[1], up.shape[0]) == (m, n)
        if not straight and not flipped:
            self._refuse_shape(module, shape, down, up)
        if not (straight and flipped):
            return flipped
        # PEFT corrects what the config says by the layer's class; only own code's is unknown.
        is_known = "auto_map" not in self._checkpoint.config
        is_conv1d = not CONV1D.isdisjoint(model_types(self._checkpoint.config))
        return is_conv1d or (self._settings.fan_in_fan_out and not is_known)

    def _scale(self, module: str, rank: int) -> float:
        try:
            said, scale = self._settings.rank_of(module), self._settings.scale_of(module)
        except ValueError as exc:
            self._refuse(f"adapter_config.json has {exc}")
        if said != rank:
            self._refuse(
                f"adapter_config.json gives {module} the rank {said}, but its factors have {rank}"
            )
        if scale == 0:
            self._still.append(module)
        return scale

    def _in_memory(self) -> dict[str, Source]:
        """Return the base's tensors as transformers has them in memory; its tables take seconds."""
        if self._runtime is None:
            self._transforms = transforms_of(self._checkpoint.config)
            base = self._checkpoint
            leaves = {name: Stored(base.store, tensor) for name, tensor in base.tensors.items()}
            self._runtime = runtime_tensors(leaves, base.config, self._transforms)
        return self._runtime

    def _tree(self, wanted: str) -> Source | None:
        """Return how a tensor that an adapter names is made of the base's; None where it isn't."""
        name = self._find(wanted)
        if name is not None:
            return Stored(self._checkpoint.store, self._checkpoint.tensors[name])
        runtime = self._in_memory()
        for named in (wanted, runtime_name(wanted, self._transforms)):
            if (tree := runtime.get(plain_name(named))) is not None:
                return tree
        return None

    def _stored(self, wanted: str) -> str | None:
        """Return the base's tensor that a name stands for alone and as it is."""
        tree = self._tree(wanted)
        return tree.name if isinstance(tree, Stored) else None

    def _find(self, wanted: str) -> str | None:
        """Return the base's name of a tensor, whatever stands before it there."""
        wanted = wanted.replace("unembed_tokens", "lm_head")
        for name in self._base if not self._ends else ():
            parts = name.split(".")
            for start in range(1, len(parts)):
                self._ends.setdefault(".".join(parts[start:]), []).append(name)
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

    def _refuse_shape(
        self, name: str, shape: tuple[int, ...], down: TensorSpec, up: TensorSpec
    ) -> NoReturn:
        m, n = shape
        self._refuse(
            f"the factors of {name} are {list(up.shape)} and {list(down.shape)}, but the base's is "
            f"{m} × {n}: the adapter was trained on another base"
        )

    def _refuse_pair(self, module: str, down: TensorSpec, up: TensorSpec) -> NoReturn:
        self._refuse(
            f"lora_A {list(down.shape)} and lora_B {list(up.shape)} of {module} do not fit "
            "together; they should be r × in and out × r (was it saved from one shard of several?)"
        )

    def _refuse(self, problem: str, *remedies: Remedy) -> NoReturn:
        text = f"the adapter {self._where!r} cannot be read: {problem}."
        raise UnsupportedCheckpointError(text, *remedies)


def _is_tied(base: Checkpoint) -> bool:
    """Return whether a model's head is its embedding: the config ties them, and they are equal."""
    kind = str((base.config.get("architectures") or ["LM"])[0])
    if "LM" not in kind and "Generation" not in kind:
        return False  # no head that writes tokens
    head = next((name for name in base.tensors if name.endswith(_HEADS)), None)
    said, table = is_tied(base.config), embedding_of(base)
    if said is False or (said is None and head is not None):
        return False
    return head is None or table is None or same_values(base, head, table)


def _slice(span: Span, size: int) -> slice:
    """Return a runtime tensor's rows of a span as a slice; all of them as the one for all."""
    if (span.row, span.row_step, span.size) == (0, 1, size):
        return _ALL
    return slice(span.row, span.row + (span.size - 1) * span.row_step + 1, span.row_step)


def _rank(spec: TensorSpec, factor: Factor) -> int:
    """Return r of the right factor."""
    if factor.pick == "stack":
        return spec.shape[1] if factor.transposed else spec.shape[2]
    if factor.pick == "rows":
        return spec.shape[0] // factor.count
    if factor.pick == "columns":
        return spec.shape[1] // factor.count
    return spec.shape[0] if factor.transposed else spec.shape[1]
