"""Which tensors of an expert stand for which of the base: by name, by what the ecosystem renames
and fuses, or not at all. One place decides; who reads an expert afterwards sees the base's layout.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ..roles import module_of, pattern_of
from ..sources.assembly import Joined, Source, Transposed
from ..sources.checkpoint import Checkpoint


@dataclass(frozen=True, slots=True)
class Matched:
    """An expert in the base's layout.

    Attributes:
        checkpoint: with the base's names, as far as they were found; the expert itself where
            every name is the same.
        renamed: base's tensor → the expert's tensors that stand for it, where these differ.
        pairs: base's and expert's tensors that nothing pairs, though they look alike.
    """

    checkpoint: Checkpoint
    renamed: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    pairs: Sequence[tuple[str, str]] = ()

    @property
    def in_words(self) -> list[str]:
        """What stands for what, base's name first; tensors that differ by numbers only once."""
        patterns = {
            f"{pattern_of(ours)} ← {pattern_of(theirs[0])}"
            + (f" and {len(theirs) - 1} more" if len(theirs) > 1 else "")
            for ours, theirs in self.renamed.items()
        }
        return sorted(patterns)


def match(base: Checkpoint, expert: Checkpoint) -> Matched:
    """Return an expert in the base's layout.

    Headers and configs alone are looked at. Where all names agree this is a comparison of two
    sets; where they do not, transformers' tables are imported, which takes seconds.
    """
    missing = [name for name in base.tensors if name not in expert.tensors]
    extra = [name for name in expert.tensors if name not in base.tensors]
    if not missing or not extra:
        return Matched(expert)
    found = _found(base, expert, set(missing))
    if not found:
        return Matched(expert, pairs=_pairs(base, expert, missing, extra))
    sources: dict[str, Source] = {}
    for name in base.tensors:
        if name in expert.tensors:
            sources[name] = expert.trees[name]
        elif name in found:
            sources[name] = found[name]
    view = expert.with_trees(sources)
    renamed = {
        name: tuple(dict.fromkeys(one.tensor.spec.name for one in view.readings(name)))
        for name in found
    }
    used = {stored for names in renamed.values() for stored in names}
    rest = {name: expert.trees[name] for name in extra if name not in used}
    view = view.with_trees({**sources, **rest})
    left = [name for name in missing if name not in found]
    return Matched(view, renamed, _pairs(base, view, left, list(rest)))


def _found(base: Checkpoint, expert: Checkpoint, missing: set[str]) -> dict[str, Source]:
    """Return what stands in the expert for tensors of the base that it has under no such name."""
    from ..sources.runtime import runtime_tensors, taken_apart, transforms_of

    found = _under_one_module(base, expert)
    if missing <= set(found):
        return found
    # Plain renaming first: it needs no table, and no torch.
    for known in (False, True):
        transforms = transforms_of(base.config, expert.config) if known else []
        theirs = runtime_tensors(expert.trees, expert.config, transforms)
        parts: dict[str, dict[int, tuple[int, Source]]] = {}
        for name, tree in runtime_tensors(base.trees, base.config, transforms).items():
            whole = _like(theirs.get(name), tree)
            if whole is None:
                continue
            for leaf, source, (start, size) in taken_apart(tree, whole):
                stored = getattr(leaf, "name", "")
                if stored not in missing or stored in found:
                    continue
                if size:
                    parts.setdefault(stored, {})[start] = (size, source)
                else:
                    found[stored] = source
        for stored, pieces in parts.items():
            rows = base.tensors[stored].spec.shape[0]
            if sum(size for size, _ in pieces.values()) == rows:
                found[stored] = Joined([pieces[start][1] for start in sorted(pieces)], 0)
        if missing <= set(found):
            break
    return found


def _under_one_module(base: Checkpoint, expert: Checkpoint) -> dict[str, Source]:
    """Return what stands for the base's tensors where one side has all of its body in a module.

    GPT-2 and BLOOM are published without the ``transformer.`` that models trained from them have; a
    BertModel lacks the ``bert.`` of a BertForMaskedLM. The module is told by the names alone: with
    it, each tensor of the side that lacks it has its counterpart, of one shape.
    """
    for outer, inner, is_base in ((expert, base, False), (base, expert, True)):
        module = _module_around(outer, inner)
        if module is None:
            continue
        pairs = {
            name: f"{module}{name}" for name in inner.tensors if f"{module}{name}" in outer.tensors
        }
        if is_base:
            return {theirs: expert.trees[name] for name, theirs in pairs.items()}
        return {name: expert.trees[theirs] for name, theirs in pairs.items()}
    return {}


def _module_around(outer: Checkpoint, inner: Checkpoint) -> str | None:
    """Return ``transformer.``, where that is before the inner names in a model; None without one.

    At least half of the inner names must be there, and none may be under another name as well.
    """
    modules: Counter[str] = Counter()
    for name in outer.tensors:
        module, _, rest = name.partition(".")
        if rest in inner.tensors and name not in inner.tensors:
            ours, theirs = outer.tensors[name].spec.shape, inner.tensors[rest].spec.shape
            modules[f"{module}."] += len(ours) == len(theirs) and ours[1:] == theirs[1:]
    ((module, count),) = modules.most_common(1) or [("", 0)]
    alone = all(number == 0 for other, number in modules.items() if other != module)
    return module if alone and 2 * count > len(inner.tensors) else None


def _like(source: Source | None, tree: Source) -> Source | None:
    """Return a tensor in another one's shape: as it is, or with a stack's matrices turned."""
    if source is None or len(source.shape) != len(tree.shape):
        return None
    if source.shape != tree.shape and len(tree.shape) == 3:
        experts, m, n = source.shape
        if (experts, n, m) == tree.shape:
            return Transposed(source, (0, 2, 1))
    # Tables with other numbers of rows are the vocabulary's business.
    return source if source.shape[1:] == tree.shape[1:] else None


# Parts at the end of two names, such as ``dense.weight``, that two layers may have in common.
_ALIKE = 2


def _pairs(
    base: Checkpoint, expert: Checkpoint, missing: Sequence[str], extra: Sequence[str]
) -> list[tuple[str, str]]:
    """Return tensors without a counterpart on both sides that may be one under two names.

    They have one module and one shape. Where most tensors have their counterpart and the modules
    around these are others, they are other layers: a pooler's ``dense`` is no head's.
    """
    is_most = 2 * len(missing) < len(base.tensors)
    waiting: dict[tuple[str, tuple[int, ...]], list[str]] = {}
    for name in extra:
        key = (module_of(name), expert.tensors[name].spec.shape)
        waiting.setdefault(key, []).append(name)
    pairs = []
    for name in missing:
        spec = base.tensors[name].spec
        others = waiting.get((module_of(name), spec.shape))
        if others and spec.shape and not (is_most and _is_elsewhere(name, others[0])):
            pairs.append((name, others.pop(0)))
    return pairs


def _is_elsewhere(name: str, other: str) -> bool:
    """Return whether two names have a module each around what they have in common."""
    ours, theirs = name.split("."), other.split(".")
    while ours and theirs and ours[-1] == theirs[-1]:
        ours.pop()
        theirs.pop()
    common = name.count(".") + 1 - len(ours)
    return bool(ours and theirs) and common <= _ALIKE
