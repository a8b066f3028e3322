"""A checkpoint's tensors under the names and in the shapes that transformers gives them when it
loads them, as trees of what is stored.

Trainers write one architecture under several names: split experts or fused ones, a text model alone
or inside a multimodal one. transformers knows the way from each of them to its own modules
(`transformers.conversion_mapping`); here the same operations are put on trees, and nothing is read.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from .assembly import Joined, Node, Part, Source, Stacked, Stored, Transposed, Woven

# What trainers' wrappers put before or between names; no model has a module that is called so.
_TRAINERS = re.compile(
    r"^(?:module\.)+|(?<![^.])(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
)
# Wrappers around a text model that trainers add and drop; transformers has no rule where one side
# is the text model alone (transformers#45357, vllm#50355).
_WRAPPERS = re.compile(
    r"^(?:base_model\.|module\.)?(?:model\.language_model\.model\.|model\.language_model\.|"
    r"language_model\.model\.|model\.text_model\.|model\.model\.|language_model\.|"
    r"thinker\.model\.|llm\.model\.|text_model\.|model\.)"
)
_DIGITS = re.compile(r"(\d+)")
# gpt-oss split by other trainers: its own layout takes gate and up by turns, [experts, in, out].
_SPLIT_EXPERT = re.compile(r"^(.*\.experts)\.(\d+)\.(gate_proj|up_proj|down_proj)\.(weight|bias)$")


class NotKnownError(Exception):
    """An operation that has no tree here."""


def transforms_of(*configs: Mapping[str, Any]) -> list[Any]:
    """Return transformers' renamings and conversions for the architectures that configs name.

    Takes seconds: transformers imports torch.
    """
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping
    from transformers.core_model_loading import PrefixChange

    names = dict.fromkeys(name for config in configs for name in _architectures(config))
    found: list[Any] = []
    for name in (*names, "legacy"):
        found += get_checkpoint_conversion_mapping(name) or []  # type: ignore[no-untyped-call]
    # A model alone is stored without the prefix that it has under a head: GPT-2, BLOOM, BERT.
    whole = [
        (config.get("architectures") or [None])[0] or config.get("model_type") for config in configs
    ]
    prefixes = dict.fromkeys(prefix for name in whole if (prefix := _prefix_of(name)))
    return [*found, *(PrefixChange(prefix_to_remove=prefix) for prefix in prefixes)]


def runtime_name(name: str, transforms: Sequence[Any]) -> str:
    """Return a tensor's name as transformers has it in memory, save for what converters rename."""
    for transform in transforms:
        if not hasattr(transform, "operations"):
            name = transform.rename_source_key(name)[0]
    return name


def runtime_tensors(
    trees: Mapping[str, Source], config: Mapping[str, Any], transforms: Sequence[Any]
) -> dict[str, Source]:
    """Return a model's tensors by runtime name, without the wrapper around a text model.

    Args:
        trees: its tensors, to be renamed and fused as when it is loaded.
        config: of the model.
        transforms: of `transforms_of`.
    """
    converters = [t for t in transforms if hasattr(t, "operations")]
    found: dict[str, Source] = {}
    groups: dict[tuple[int, str], dict[str, list[str]]] = {}
    for name in sorted(trees, key=_natural):
        renamed = runtime_name(name, transforms)
        for number, converter in enumerate(converters):
            target, pattern = converter.rename_source_key(renamed)
            if pattern is not None:
                groups.setdefault((number, target), {}).setdefault(pattern, []).append(name)
                break
        else:
            found[plain_name(renamed)] = trees[name]
    for (number, target), names in groups.items():
        try:
            sources = {pattern: [trees[name] for name in every] for pattern, every in names.items()}
            made = dict(_converted(converters[number], target, sources))
        except (NotKnownError, ValueError, IndexError):
            made = {n: trees[n] for every in names.values() for n in every}
        found |= {plain_name(name): source for name, source in made.items()}
    if config.get("model_type") == "gpt_oss":
        _fuse_gpt_oss(found)
    return found


def plain_name(name: str) -> str:
    """Return a parameter's name without the wrapper that a multimodal model has around it."""
    inner = _WRAPPERS.sub("", _TRAINERS.sub("", name), count=1)
    return inner.removeprefix("model.")


def taken_apart(tree: Source, whole: Source) -> Iterator[tuple[Source, Source, tuple[int, int]]]:
    """Yield the leaves of a tree, each with what stands for it in another tensor like the tree's.

    Args:
        tree: how one checkpoint makes a runtime tensor of what it stores.
        whole: the same runtime tensor of another checkpoint.

    Yields:
        A leaf; its counterpart; and (start, size) along the first axis where the counterpart is
        only that part of the leaf, (0, 0) where it is all of it.
    """
    if isinstance(tree, Stacked):
        from .assembly import Item

        for number, part in enumerate(tree.parts):
            yield from taken_apart(part, Item(whole, number))
    elif isinstance(tree, Joined):
        offset = 0
        for part in tree.parts:
            size = part.shape[tree.axis]
            yield from taken_apart(part, Part(whole, tree.axis, offset, size))
            offset += size
    elif isinstance(tree, Woven):
        count = len(tree.parts)
        for number, part in enumerate(tree.parts):
            piece = Part(whole, tree.axis, number, part.shape[tree.axis], count)
            yield from taken_apart(part, piece)
    elif isinstance(tree, Transposed):
        back = tuple(sorted(range(len(tree.axes)), key=tree.axes.__getitem__))
        yield from taken_apart(tree.of, Transposed(whole, back))
    elif isinstance(tree, Part) and tree.axis == 0 and tree.step == 1:
        yield tree.of, whole, (tree.start, tree.shape[0])
    elif isinstance(tree, Part):
        return  # a part of a stored tensor along another axis: not put together again
    else:
        yield tree, whole, (0, 0)


@dataclass(frozen=True, slots=True)
class Span:
    """Indices of one axis of a runtime tensor, and where they lie on an axis of a stored one.

    Attributes:
        axis: of the runtime tensor.
        size: how many indices.
        row, row_step: the first on the runtime tensor's axis, and from each to the next.
        place, step: likewise on the stored tensor's.
    """

    axis: int
    size: int
    row: int = 0
    row_step: int = 1
    place: int = 0
    step: int = 1

    def among(self, first: int, stop: int, every: int = 1) -> Span:
        """Return every so many of the indices."""
        return Span(
            self.axis,
            max(-(-(stop - first) // every), 0),
            self.row + first * self.row_step,
            self.row_step * every,
            self.place + first * self.step,
            self.step * every,
        )


@dataclass(frozen=True, slots=True)
class Leaf:
    """Where a part of a runtime tensor is stored.

    Attributes:
        name: of the stored tensor.
        spans: a part of the runtime tensor, one for each axis of the stored one.
        index: of the runtime tensor's first axis, where the stored tensor is of that index alone.
    """

    name: str
    spans: tuple[Span, ...]
    index: int | None = None


def leaves_of(tree: Source) -> Iterator[Leaf]:
    """Yield where the parts of a runtime tensor are stored.

    Args:
        tree: of `runtime_tensors`.

    Raises:
        NotKnownError: it is made of what is stored in a way that has no places.
    """
    yield from _leaves(tree, tuple(Span(axis, size) for axis, size in enumerate(tree.shape)), None)


def _leaves(tree: Source, spans: tuple[Span, ...], index: int | None) -> Iterator[Leaf]:
    if isinstance(tree, Stored):
        yield Leaf(tree.name, spans, index)
    elif isinstance(tree, Transposed):
        inner = dict(zip(tree.axes, spans, strict=True))
        yield from _leaves(tree.of, tuple(inner[axis] for axis in range(len(spans))), index)
    elif isinstance(tree, Part):
        span = spans[tree.axis]
        own = replace(span, place=tree.start + span.place * tree.step, step=span.step * tree.step)
        yield from _leaves(tree.of, _with(spans, tree.axis, own), index)
    elif isinstance(tree, Stacked) and index is None:
        span = spans[0]
        for number in range(span.size):
            part = tree.parts[span.place + number * span.step]
            yield from _leaves(part, spans[1:], span.row + number * span.row_step)
    elif isinstance(tree, Joined):
        span, offset = spans[tree.axis], 0
        for part in tree.parts:
            size = part.shape[tree.axis]
            first, stop = (
                min(max(-(-(end - span.place) // span.step), 0), span.size)
                for end in (offset, offset + size)
            )
            if first < stop:
                own = span.among(first, stop)
                own = replace(own, place=own.place - offset)
                yield from _leaves(part, _with(spans, tree.axis, own), index)
            offset += size
    elif isinstance(tree, Woven):
        span, count = spans[tree.axis], len(tree.parts)
        turns = [(span.place + number * span.step) % count for number in range(span.size)]
        period = count // math.gcd(span.step, count)
        for number, part in enumerate(tree.parts):
            if number in turns[:period]:
                own = span.among(turns.index(number), span.size, period)
                own = replace(own, place=own.place // count, step=own.step // count)
                yield from _leaves(part, _with(spans, tree.axis, own), index)
    else:
        raise NotKnownError(type(tree).__name__)


def _with(spans: tuple[Span, ...], axis: int, span: Span) -> tuple[Span, ...]:
    return (*spans[:axis], span, *spans[axis + 1 :])


def _prefix_of(architecture: object) -> str | None:
    """Return what stands before a model's names where a head is on it, as transformers does."""
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

    if not isinstance(architecture, str):
        return None
    name = MODEL_MAPPING_NAMES.get(architecture, architecture)
    kind = getattr(transformers, name, None) if isinstance(name, str) else None
    prefix = getattr(kind, "base_model_prefix", None)
    return prefix if isinstance(prefix, str) and prefix else None


def _architectures(config: Mapping[str, Any]) -> Iterator[str]:
    named = config.get("architectures")
    yield from (name for name in (named if isinstance(named, list) else []) if name)
    yield from model_types(config)


def model_types(config: Mapping[str, Any]) -> Iterator[str]:
    """Yield the model types that a config and its parts name."""
    for section in (config, *(value for value in config.values() if isinstance(value, dict))):
        if isinstance(section.get("model_type"), str):
            yield section["model_type"]


def _converted(
    converter: Any, target: str, sources: Mapping[str, list[Source]]
) -> Iterator[tuple[str, Source]]:
    """Yield what a converter makes of the tensors that it matched."""
    patterns = [pattern for pattern in converter.source_patterns if pattern in sources]
    if len(patterns) < len(converter.source_patterns):
        raise NotKnownError(target)  # half of a pair: gate without up
    parts = [sources[pattern] for pattern in patterns]
    for operation in converter.operations:
        parts = _applied(operation, parts, len(converter.target_patterns))
    if any(len(part) != 1 for part in parts) or len(parts) != len(converter.target_patterns):
        raise NotKnownError(target)
    first = converter.target_patterns[0]
    for pattern, part in zip(converter.target_patterns, parts, strict=True):
        yield target.replace(first, pattern, 1), part[0]


def _applied(operation: Any, parts: list[list[Source]], targets: int) -> list[list[Source]]:
    """Return what one of transformers' operations makes of lists of tensors, one a pattern."""
    kind = type(operation).__name__
    if kind == "MergeModulelist" and operation.dim == 0:
        return [[Stacked(part)] for part in parts]
    flat = [source for part in parts for source in part]
    if kind == "Concatenate":
        return [[Joined(flat, operation.dim % len(flat[0].shape))]]
    if len(flat) != 1:
        raise NotKnownError(kind)
    (only,) = flat
    if kind == "Chunk":
        axis = operation.dim % len(only.shape)
        size = only.shape[axis] // targets
        return [[Part(only, axis, number * size, size)] for number in range(targets)]
    if kind == "Transpose" and not operation.check_dims:
        axes = list(range(len(only.shape)))
        first, second = operation.dim0, operation.dim1
        axes[first], axes[second] = axes[second], axes[first]
        return [[Transposed(only, tuple(axes))]]
    if kind == "Interleave" and not operation.inverse:
        # By turns as stored, one after the other as loaded.
        axis = operation.dim % len(only.shape)
        size = only.shape[axis] // 2
        halves: list[Source] = [Part(only, axis, number, size, 2) for number in range(2)]
        return [[Joined(halves, axis)]]
    raise NotKnownError(kind)


def _fuse_gpt_oss(found: dict[str, Source]) -> None:
    """Put split experts of gpt-oss together as it stores them; a table of ours."""
    layers: dict[tuple[str, str], dict[tuple[str, int], Source]] = {}
    for name in list(found):
        matched = _SPLIT_EXPERT.match(name)
        if matched:
            experts, number, module, kind = matched.groups()
            layers.setdefault((experts, kind), {})[module, int(number)] = found.pop(name)
    for (experts, kind), tensors in layers.items():
        numbers = sorted({number for _, number in tensors})
        if {(m, n) for m in ("gate_proj", "up_proj", "down_proj") for n in numbers} != set(tensors):
            continue

        def of_expert(source: Node | Source, is_weight: bool = kind == "weight") -> Source:
            return Transposed(source, (1, 0)) if is_weight else source

        pairs = [
            of_expert(Woven([tensors["gate_proj", n], tensors["up_proj", n]], 0)) for n in numbers
        ]
        end = "" if kind == "weight" else "_bias"
        found[f"{experts}.gate_up_proj{end}"] = Stacked(pairs)
        found[f"{experts}.down_proj{end}"] = Stacked(
            [of_expert(tensors["down_proj", n]) for n in numbers]
        )


def _natural(name: str) -> list[Any]:
    """Order names with numbers by their numbers: experts.2 before experts.10."""
    return [int(part) if part.isdigit() else part for part in _DIGITS.split(name)]
