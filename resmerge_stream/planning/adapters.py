"""Adapters among a plan's experts: each is put on the base, or refused. No torch."""

from collections.abc import Sequence
from itertools import combinations

from ..errors import Findings, ResMergeError
from ..recipe import ModelRef, Recipe
from ..sources import Checkpoint
from ..sources.adapter import (
    Adapter,
    announced_absent,
    are_twins,
    base_mismatch,
    is_bare_adapter,
)
from .compat import readable


def check_named_bases(recipe: Recipe, found: Findings) -> None:
    """Refuse ``base+adapter`` where that base is not the recipe's, or is the merge's base."""
    base = recipe.base
    if base is not None and base.on is not None:
        found.problem(
            f"base_model cannot be a model with an adapter, as {base} is. Merge the adapter first, "
            f"by a recipe with merge_method: passthrough and {base} as its one model, and name "
            "that merge's folder here."
        )
        return
    for ref in recipe.models:
        if ref.on is None or (base is not None and ModelRef.parse(ref.on).place == base.place):
            continue
        whose = "which has none" if base is None else f"which is {base}"
        found.problem(
            f"{ref} puts its adapter on another model than the base of the merge, {whose}. Merge "
            f"the adapter first, by a recipe with merge_method: passthrough and {ref} as its one "
            "model, and name that merge's folder here."
        )


def check_whole(layout: Checkpoint, found: Findings) -> None:
    """Refuse an adapter in the place of a whole model."""
    if is_bare_adapter(layout):
        found.problem(
            f"{layout.id} is an adapter, not a whole model. Give the model that it was trained on "
            "as the base, and the adapter as an expert."
        )


def is_adapter(source: Checkpoint) -> bool:
    """Return whether a checkpoint is an adapter, on a base or not."""
    return isinstance(source, Adapter) or is_bare_adapter(source)


def on_base(base: Checkpoint, expert: Checkpoint, found: Findings) -> Checkpoint:
    """Return an expert that reads as numbers; an adapter is seen in the base's layout.

    Args:
        base: the checkpoint that gives the layout, as it will be read.
        expert: as opened.
        found: takes what is wrong with an adapter.
    """
    # A plan of the same models hands its own on, already on a base.
    own = expert.opened if isinstance(expert, Adapter) else expert
    if not is_bare_adapter(own):
        return readable(own, found, is_expert=True)
    try:
        adapter = Adapter.of(own, base)
    except ResMergeError as exc:
        found.problems += exc.notices
        return expert
    said = (base_mismatch(adapter, base), announced_absent(adapter, base), *adapter.notes)
    for warning in said:
        if warning is not None:
            found.warning(warning)
    return adapter


def check_twins(experts: Sequence[Checkpoint], found: Findings) -> None:
    """Warn of an adapter that is there under two names: it counts twice."""
    adapters = [expert for expert in experts if isinstance(expert, Adapter)]
    for left, right in combinations(adapters, 2):
        # One that is listed twice is told already.
        if left.id != right.id and are_twins(left, right):
            found.warning(f"{left.id} and {right.id} hold the same adapter, which counts twice")
