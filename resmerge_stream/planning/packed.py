"""A base of packed codes: what no expert changes is carried as it is stored.

An adapter that is written needs no value of the base, so that no format of the base stands in its
way. A whole model is written where the experts change plain tensors only; its packed tensors and
their config are the base's to the byte. That whole experts have the same is looked at in a few rows
while planning, and in every byte while merging.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from ..errors import Findings, Remedy, ResMergeError, listed
from ..sources import Checkpoint
from ..sources.adapter import Adapter, is_bare_adapter
from ..sources.assembly import Source, Stored
from ..sources.quantised import Alike, Quantised, Unread, dequantised, inspect, unpacked_name

PACKED = "packed"
# Of models on the Hub: how many of the packed tensors are looked at while planning.
_FAR_TENSORS = 8
_FACTOR = re.compile(r"(?:base_model\.model\.)?(.+)\.lora_([AB])(?:\.default)?\.weight")
# Where the parts of a name begin that a checkpoint and its model at run time have in common.
_BLOCKS = re.compile(r"(?:^|\.)((?:layers|h|blocks?)\.\d+\..+)")


def passed_through(
    layout: Checkpoint, others: Sequence[Checkpoint], found: Findings, *, as_adapter: bool
) -> tuple[Checkpoint, list[Checkpoint]] | None:
    """Return base and experts as they are stored, where that suffices; None: numbers are needed.

    Args:
        layout: the base, as opened.
        others: the experts.
        found: takes what an expert changes and the base holds packed; and what is carried.
        as_adapter: whether an adapter is written.
    """
    own = [one.opened if isinstance(one, Adapter) else one for one in others]
    adapters = [one for one in own if is_bare_adapter(one)]
    whole = [one for one in own if not is_bare_adapter(one)]
    if not own or (whole and as_adapter):
        return None
    codes = inspect(layout)
    held = {unpacked_name(name): name for name in codes.packed}
    held |= {plain: name for name, plain in codes.codes.items()}
    if not held:
        return None
    in_words = ", ".join(sorted({*codes.packed.values(), *codes.forms}))
    parts = _parts_of(layout, held.values())
    if differing := _differing(layout, whole, parts):
        if not set(differing) & _parts_of(layout, codes.packed):
            return None
        found.problem(
            f"{len(differing)} packed tensor(s) of the experts differ from those of {layout.id} "
            f"({in_words}): {listed(differing, limit=3)}. Codes can be carried, but not merged; "
            "give the originals in bfloat16, float16, float32 or FP8."
        )
        return layout, list(others)
    shapes = _shapes(held, adapters)
    try:
        probe = _with_shapes(layout, codes, held, shapes)
        touched = {name for own in adapters for name in Adapter.of(own, probe).edits}
    except ResMergeError:
        return None  # said again, where adapters are put on the base
    packed = [name for name in held if name in touched and held[name] in codes.packed]
    if as_adapter and packed:
        found.warning(
            f"{layout.id} is quantised ({in_words}): its values are not read, which an adapter "
            "does not need. Whether the shapes fit, only loading it can tell",
            kind=PACKED,
        )
        return _with_shapes(layout, codes, held, shapes), list(others)
    if packed:
        found.problem(
            f"{len(packed)} tensor(s) that the adapters change are packed in {layout.id} "
            f"({in_words}): {listed(packed, limit=3)}. Only plain tensors of it can be merged "
            "into; give the original in bfloat16, float16, float32 or FP8.",
            Remedy.AS_ADAPTER,
        )
        return layout, list(others)
    if touched & set(held):
        return None
    found.warning(
        f"{len(held)} tensor(s) of {layout.id} stay quantised as they are ({in_words}): no expert "
        "changes them",
        kind=PACKED,
    )
    if not whole:
        return layout, list(others)
    # The packed tensors are the base's, compared when they are read.
    stored = {name: tree for name in parts if isinstance(tree := layout.trees[name], Stored)}
    apart = [one for one in others if not isinstance(one, Adapter) and not is_bare_adapter(one)]
    alike = {
        name: Alike(tree, {one.id: one.trees[name] for one in apart})
        for name, tree in stored.items()
    }
    return layout.with_trees({**layout.trees, **alike}), [
        one.with_trees({**one.trees, **stored}) if one in apart else one for one in others
    ]


def _parts_of(layout: Checkpoint, codes: Iterable[str]) -> set[str]:
    """Return codes and what lies beside them: all of their modules but biases."""
    modules = {name.rpartition(".")[0] for name in codes}
    found = set()
    for name in layout.tensors:
        # bitsandbytes puts a state's tensors below the weight.
        above = name.partition(".weight.")[0] if ".weight." in name else ""
        if not name.endswith("bias") and {name.rpartition(".")[0], above} & modules:
            found.add(name)
    return found


def _differing(
    layout: Checkpoint, experts: Iterable[Checkpoint], parts: Iterable[str]
) -> list[str]:
    """Return the packed tensors that whole experts have otherwise, as far as a few rows show it."""
    found: dict[str, None] = {}
    every = sorted(parts)
    for expert in experts:
        is_far = layout.is_remote or expert.is_remote
        looked_at = set(every[:: max(len(every) // _FAR_TENSORS, 1)] if is_far else every)
        for name in every:
            ours = layout.tensors[name].spec
            theirs = expert.tensors[name].spec if name in expert.tensors else None
            is_like = theirs is not None and (ours.dtype, ours.shape) == (
                theirs.dtype,
                theirs.shape,
            )
            rows = ours.matrix_shape[0]
            if is_like and name in looked_at:
                some = [slice(at, at + 1) for at in sorted({0, rows // 2, rows - 1}) if at < rows]
                is_like = all(layout.read(name, one) == expert.read(name, one) for one in some)
            if not is_like:
                found[name] = None
    return list(found)


def _shapes(held: Mapping[str, str], adapters: Iterable[Checkpoint]) -> dict[str, tuple[int, int]]:
    """Return the shapes that adapters' factors give to weights that are packed in the base."""
    by_block = {_in_block(name): name for name in held}
    sizes: dict[str, dict[str, int]] = {}
    for adapter in adapters:
        for key, stored in adapter.tensors.items():
            shape = stored.spec.shape
            if (factor := _FACTOR.fullmatch(key)) and len(shape) == 2:
                name = by_block.get(_in_block(f"{factor[1]}.weight"))
                if name is not None:
                    side = shape[1] if factor[2] == "A" else shape[0]
                    sizes.setdefault(name, {}).setdefault(factor[2], side)
    return {name: (size["B"], size["A"]) for name, size in sizes.items() if len(size) == 2}


def _in_block(name: str) -> str:
    block = _BLOCKS.search(name)
    return block[1] if block else name


def _with_shapes(
    layout: Checkpoint,
    codes: Quantised,
    held: Mapping[str, str],
    shapes: Mapping[str, tuple[int, int]],
) -> Checkpoint:
    """Return the base with a shape, and no values, in the place of codes that cannot be read."""
    readable = dequantised(layout, codes)
    plain = {name: plain for plain, name in held.items() if name in codes.packed}
    trees: dict[str, Source] = {}
    for name, tree in readable.trees.items():
        if name in plain and plain[name] in shapes:
            trees[plain[name]] = Unread(tree, shapes[plain[name]])
        else:
            trees[name] = tree
    return replace(readable, trees=trees)
