"""A checkpoint's tensors under the names and in the shapes that transformers gives them when it
loads them, as trees of what is stored.

Trainers write one architecture under several names: split experts or fused ones, a text model alone
or inside a multimodal one. transformers knows the way from each of them to its own modules
(`transformers.conversion_mapping`); here the same operations are put on trees, and nothing is read.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from .assembly import Joined, Node, Part, Source, Stacked, Turned, Woven
from .checkpoint import Checkpoint
from .view import source_of

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

    found: list[Any] = []
    seen: set[str] = set()
    for config in configs:
        for name in _architectures(config):
            if name not in seen:
                seen.add(name)
                found += get_checkpoint_conversion_mapping(name) or []  # type: ignore[no-untyped-call]
    return found


def runtime_tensors(checkpoint: Checkpoint, transforms: Sequence[Any]) -> dict[str, Source]:
    """Return a checkpoint's tensors by runtime name, without the wrapper around a text model.

    Args:
        checkpoint: whose names are renamed and whose tensors are fused as when it is loaded.
        transforms: of `transforms_of`.
    """
    renamings = [t for t in transforms if not hasattr(t, "operations")]
    converters = [t for t in transforms if hasattr(t, "operations")]
    found: dict[str, Source] = {}
    groups: dict[tuple[int, str], dict[str, list[str]]] = {}
    for name in sorted(checkpoint.tensors, key=_natural):
        renamed = name
        for renaming in renamings:
            renamed = renaming.rename_source_key(renamed)[0]
        for number, converter in enumerate(converters):
            target, pattern = converter.rename_source_key(renamed)
            if pattern is not None:
                groups.setdefault((number, target), {}).setdefault(pattern, []).append(name)
                break
        else:
            found[plain_name(renamed)] = source_of(checkpoint, name)
    for (number, target), names in groups.items():
        try:
            made = dict(_converted(checkpoint, converters[number], target, names))
        except (NotKnownError, ValueError, IndexError):
            made = {n: source_of(checkpoint, n) for every in names.values() for n in every}
        found |= {plain_name(name): source for name, source in made.items()}
    if checkpoint.config.get("model_type") == "gpt_oss":
        _fuse_gpt_oss(found)
    return found


def plain_name(name: str) -> str:
    """Return a parameter's name without the wrapper that a multimodal model has around it."""
    inner = _WRAPPERS.sub("", name, count=1)
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
    elif isinstance(tree, Turned):
        back = tuple(sorted(range(len(tree.axes)), key=tree.axes.__getitem__))
        yield from taken_apart(tree.of, Turned(whole, back))
    elif isinstance(tree, Part) and tree.axis == 0 and tree.step == 1:
        yield tree.of, whole, (tree.start, tree.shape[0])
    elif isinstance(tree, Part):
        return  # a part of a stored tensor along another axis: not put together again
    else:
        yield tree, whole, (0, 0)


def _architectures(config: Mapping[str, Any]) -> Iterator[str]:
    named = config.get("architectures")
    yield from (name for name in (named if isinstance(named, list) else []) if name)
    for section in (config, *(value for value in config.values() if isinstance(value, dict))):
        if isinstance(section.get("model_type"), str):
            yield section["model_type"]


def _converted(
    checkpoint: Checkpoint, converter: Any, target: str, names: Mapping[str, Sequence[str]]
) -> Iterator[tuple[str, Source]]:
    """Yield what a converter makes of the tensors that it matched."""
    patterns = [pattern for pattern in converter.source_patterns if pattern in names]
    if len(patterns) < len(converter.source_patterns):
        raise NotKnownError(target)  # half of a pair: gate without up
    parts = [[source_of(checkpoint, name) for name in names[pattern]] for pattern in patterns]
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
        return [[Turned(only, tuple(axes))]]
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
            return Turned(source, (1, 0)) if is_weight else source

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
