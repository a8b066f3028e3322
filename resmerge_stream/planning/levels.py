"""The levels of a recipe — recipe, module, slice, model — walked once: every key is read or named.

mergekit looks a parameter up in the source of a slice, in the slice, in the module and in the
recipe, one by one, and where no filter of a level fits, in the next. One module with one slice over
all layers is what can be merged here, so the levels above a model come to one mapping.
"""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import RecipeError, Remedy, listed, shown
from ..methods import MergeMethod, is_idle, is_parameter
from ..methods.settings import before, check_setting, whole_number


@dataclass(frozen=True, slots=True)
class Level:
    """One level of a recipe.

    Attributes:
        name: for messages.
        keys: what is read of it.
        idle: what mergekit knows there, and uses for nothing.
    """

    name: str
    keys: tuple[str, ...]
    idle: tuple[str, ...] = ()


RECIPE = Level(
    "the recipe",
    (
        "merge_method", "base_model", "models", "slices", "modules", "parameters", "dtype",
        "out_dtype", "tokenizer_source", "tokenizer", "chat_template",
        "generation_config",
    ),
    ("name",),
)  # fmt: skip
MODULE = Level("a module", ("models", "slices", "parameters"))
SLICE = Level("a slice", ("sources", "base_model", "parameters"), ("residual_weight",))
SOURCE = Level("a source of a slice", ("model", "layer_range", "parameters"))
MODEL = Level("an entry of 'models'", ("model", "parameters"))
_LEVELS = (RECIPE, MODULE, SLICE, SOURCE, MODEL)

# What mergekit reads at one level, and ignores at those below.
_KNOWN = {key for level in _LEVELS for key in (*level.keys, *level.idle)}
# What stands under one key of a recipe, by what it is called.
_BELONGS = {"pad_to_multiple_of": "tokenizer", "tokens": "tokenizer"}
# What mergekit's other programs know, with what to write instead.
_ELSEWHERE: dict[str, tuple[str, *tuple[Remedy, ...]]] = {
    "merge": ("this is a mergekit multi-merge entry; write one recipe a merge",),
    "stages": ("this is a list of merges; run its recipes one after the other",),
    "out_path": ("this is one of several merges in a file; write one recipe a merge",),
    "experts": ("building mixtures of experts is left to mergekit-moe",),
    "gate_mode": ("building mixtures of experts is left to mergekit-moe",),
    "genome": ("searching for a recipe is left to mergekit-evolve",),
    "residual_weight": ("stacking layers is left to mergekit",),
}
# Parameters of mergekit's that have no effect here, with the reason.
_IDLE = {"int8_mask": "masks are not stored here"}


@dataclass(frozen=True, slots=True)
class Entry:
    """A model that a recipe lists.

    Attributes:
        model: as written.
        parameters: its own, of the right form.
    """

    model: object
    parameters: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Walked:
    """What the levels of a recipe come to.

    Attributes:
        bases: as written: the slice's, then the recipe's; the first is the base of the merge.
        models: in order.
        parameters: of the whole merge; where no filter of a level fits, the next level's follow.
        layers: how many the slice spans; None: there is none.
        notes: what has no effect.
    """

    bases: tuple[object, ...]
    models: tuple[Entry, ...]
    parameters: dict[str, Any]
    layers: int | None
    notes: tuple[str, ...]


def walked(document: Mapping[Any, Any], where: str, method: type[MergeMethod]) -> Walked:
    """Return what the levels of a recipe come to.

    Args:
        document: the recipe.
        where: what to call it in errors.
        method: the one that the recipe names.

    Raises:
        RecipeError: a key is unknown, a value of the wrong form, or layers would be stacked.
    """
    notes: list[str] = []
    levels: list[tuple[Level, Mapping[Any, Any]]] = []

    def enter(level: Level, place: Mapping[Any, Any]) -> Mapping[Any, Any]:
        _check_keys(place, level, where, method, notes)
        levels.append((level, place))
        return place

    place, of_models, layers = enter(RECIPE, document), MODEL, None
    if _filled(place, ("models", "slices", "modules"), where) == "modules":
        modules = place["modules"]
        only = next(iter(modules.values())) if isinstance(modules, Mapping) and modules else None
        if (
            not isinstance(only, Mapping)
            or len(modules) > 1
            or not {"slices", "models"} & set(only)
        ):
            raise RecipeError(f"{where}: 'modules' must name one module with its slices or models.")
        place = enter(MODULE, only)
    entries = place.get("models")
    if _filled(place, ("models", "slices"), where) == "slices":
        slices = place["slices"]
        one = slices[0] if isinstance(slices, list) and len(slices) == 1 else None
        if not isinstance(one, Mapping) or not isinstance(one.get("sources"), list):
            raise RecipeError(
                f"{where}: 'slices' must be one slice over the whole depth; list the models under "
                "'models' otherwise. Stacking layers is left to mergekit."
            )
        place = enter(SLICE, one)
        entries, of_models = place["sources"], SOURCE
        # The sources span all layers, from the first.
        ranges = [source.get("layer_range") for source in entries if isinstance(source, Mapping)]
        ends = {
            tuple(whole_number(end) for end in pair) if isinstance(pair, list) else ()
            for pair in ranges
        }
        whole = ends.pop() if len(ends) == 1 and len(ranges) == len(entries) else ()
        if len(whole) != 2 or whole[0] != 0 or whole[1] is None or whole[1] < 1:
            raise RecipeError(
                f"{where}: every source of 'slices' must have the same layer_range [0, LAYERS]. "
                "Stacking layers is left to mergekit."
            )
        layers = whole[1]
    if not isinstance(entries, Sequence) or isinstance(entries, str) or not entries:
        raise RecipeError(f"{where} needs a list under 'models', one '- model: ID' an expert.")
    models = []
    for entry in entries:
        if isinstance(entry, str):
            entry = {"model": entry}
        if not isinstance(entry, Mapping) or "model" not in entry:
            raise RecipeError(f"an entry of 'models' must be '- model: ID', not {shown(entry)}.")
        _check_keys(entry, of_models, where, method, notes)
        own = _settings(entry.get("parameters"), method, notes, of_model=True)
        models.append(Entry(entry["model"], own))
    parameters: dict[str, Any] = {}
    for _, place in levels:
        shared = _settings(place.get("parameters"), method, notes, of_model=False)
        for key, setting in shared.items():
            parameters[key] = before(setting, parameters.get(key))
    bases = [place.get("base_model") for level, place in levels if "base_model" in level.keys]
    return Walked(
        tuple(base for base in reversed(bases) if base is not None),
        tuple(models),
        parameters,
        layers,
        tuple(dict.fromkeys(notes)),
    )


def _check_keys(
    place: Mapping[Any, Any],
    level: Level,
    where: str,
    method: type[MergeMethod],
    notes: list[str],
) -> None:
    """Refuse the keys that nothing reads, and note those that mergekit ignores."""
    inside = "" if level is RECIPE else f" in {level.name}"
    for key, value in place.items():
        if key in level.keys:
            continue
        if key in level.idle or (level is not RECIPE and key in _KNOWN):
            if value is not None:
                notes.append(f"{key}{inside} has no effect, here as in mergekit: {shown(value)}")
            continue
        if key in _ELSEWHERE:
            instead, *remedies = _ELSEWHERE[key]
            raise RecipeError(f"{where}: {key!r} is not supported; {instead}.", *remedies)
        under = _BELONGS.get(key, "parameters" if is_parameter(method, key) else "")
        if under:
            raise RecipeError(
                f"{where}: {key!r} stands{inside or ' at the top'} itself; put it under {under!r}."
            )
        meant = difflib.get_close_matches(str(key)[:100], level.keys, n=1)
        above = difflib.get_close_matches(str(key)[:100], RECIPE.keys, n=1)
        hint = f" Known keys: {listed(level.keys)}."
        if meant or above:
            hint = f" Did you mean {(meant or above)[0]!r}?"
            hint += "" if meant else " It stands at the top of a recipe."
        raise RecipeError(f"{where}: unknown key {shown(key)}{inside}.{hint}")


def _filled(place: Mapping[Any, Any], keys: Sequence[str], where: str) -> str:
    """Return which one of some keys has something in it, or else is there."""
    filled = [key for key in keys if place.get(key)]
    if len(filled) > 1:
        raise RecipeError(
            f"{where}: {listed(filled)} stand side by side. Keep one: each of them says which "
            "models are merged."
        )
    there = [*filled, *(key for key in keys if place.get(key) is not None)]
    return there[0] if there else keys[0]


def _settings(
    parameters: object, method: type[MergeMethod], notes: list[str], *, of_model: bool
) -> dict[str, Any]:
    """Return parameters whose form is right; their values are the method's business."""
    parameters = {} if parameters is None else parameters
    if not isinstance(parameters, Mapping) or not all(isinstance(key, str) for key in parameters):
        raise RecipeError(
            f"parameters must be a mapping of names to values, not {shown(parameters)}."
        )
    which = "of a single model" if of_model else "of its own"
    kept = {}
    for key, value in parameters.items():
        if key in _IDLE:
            notes.append(f"{key} has no effect: {_IDLE[key]}")
        elif is_idle(method, key, of_model=of_model):
            why = f"{method.name} has no such parameter {which}, here as in mergekit"
            notes.append(f"{key} has no effect: {why}")
        else:
            check_setting(key, value)
            kept[key] = value
    return kept
