"""Adapters among a plan's experts: each is put on the base, or refused. No torch."""

from ..errors import Findings, ResMergeError
from ..recipe import ModelRef, Recipe
from ..sources import Checkpoint
from ..sources.adapter import AdapterCheckpoint, base_mismatch, is_bare_adapter
from .compat import readable


def check_named_bases(recipe: Recipe, found: Findings) -> None:
    """Refuse ``base+adapter`` where that base is not the recipe's."""
    for ref in recipe.experts:
        named = None if ref.on is None else ModelRef.parse(ref.on)
        if named is not None and (recipe.base is None or named.place != recipe.base.place):
            found.problem(
                f"{ref} puts its adapter on {ref.on}, but the base of the merge is "
                f"{recipe.base or 'none'}. An adapter is merged on the base that it was trained "
                "on: give that as base_model."
            )


def check_whole(layout: Checkpoint, found: Findings) -> None:
    """Refuse an adapter in the place of a whole model."""
    if is_bare_adapter(layout):
        found.problem(
            f"{layout.id} is an adapter, not a whole model. Give the model that it was trained on "
            "as the base, and the adapter as an expert."
        )


def on_base(base: Checkpoint, expert: Checkpoint, found: Findings) -> Checkpoint:
    """Return an expert that reads as numbers; an adapter is seen in the base's layout.

    Args:
        base: the checkpoint that gives the layout, as it will be read.
        expert: as opened.
        found: takes what is wrong with an adapter.
    """
    # A plan of the same models hands its own on, already on a base.
    own = expert.own if isinstance(expert, AdapterCheckpoint) else expert
    if not is_bare_adapter(own):
        return readable(own, found)
    try:
        adapter = AdapterCheckpoint(own, base)
    except ResMergeError as exc:
        found.problems += exc.notices
        return expert
    mismatch = base_mismatch(adapter, base)
    if mismatch is not None:
        found.warning(mismatch)
    return adapter
