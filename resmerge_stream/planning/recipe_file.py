"""Recipe files in mergekit's vocabulary: from a file, a text or plain data to a recipe."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from ..errors import RecipeError, Remedy, listed, shown
from ..methods import method_class
from ..methods.settings import before, checked_weight, is_plain
from ..recipe import DEFAULT_METHOD, ModelRef, Recipe, checked_dtype, parse_method
from .levels import Entry, walked
from .recipe_text import MAX_CARD_BYTES, MAX_RECIPE_BYTES, document_of
from .tokenizer_keys import chat_template_of, generation_config_of, tokenizer_of

__all__ = ["MAX_RECIPE_BYTES", "load_recipe", "parse_recipe", "recipe_from_dict"]


def load_recipe(path: str | Path) -> Recipe:
    """Read a recipe file.

    Args:
        path: a YAML file in mergekit's vocabulary, or a model card that holds one recipe.

    Raises:
        RecipeError: the file is missing, too large, not YAML, or holds a wrong key or value.
    """
    path = Path(path)
    limit = MAX_CARD_BYTES if path.suffix.lower() == ".md" else MAX_RECIPE_BYTES
    try:
        with path.open("rb") as file:
            data = file.read(limit + 1)
    except (OSError, ValueError) as exc:
        reason = exc.strerror if isinstance(exc, OSError) else exc
        raise RecipeError(
            f"cannot read the recipe {str(path)!r}: {reason}.", Remedy.GIVE_MODELS
        ) from exc
    if len(data) > limit:
        raise RecipeError(f"the recipe {str(path)!r} is larger than {limit} bytes; is it a recipe?")
    return parse_recipe(data, where=str(path))


def parse_recipe(data: bytes | str, *, where: str = "recipe") -> Recipe:
    """Return the recipe that a text describes.

    Args:
        data: a YAML document, the same inside a fence, or a model card that holds one recipe.
        where: what to call it in errors.

    Raises:
        RecipeError: the document is not YAML, or holds a wrong key or value.
    """
    try:
        return recipe_from_dict(document_of(data, where=where), where=where)
    except RecursionError as exc:
        raise RecipeError(f"{where} is nested too deeply to be a recipe.") from exc


def recipe_from_dict(document: object, *, where: str = "recipe") -> Recipe:
    """Return the recipe in a mapping of mergekit's vocabulary.

    Raises:
        RecipeError: a key is unknown or unsupported, or a value is of the wrong kind.
    """
    if not isinstance(document, Mapping):
        raise RecipeError(
            f"{where} must be a mapping with the keys base_model and models, "
            f"not {type(document).__name__}."
        )
    is_named = "merge_method" in document
    method, preset = _method(document["merge_method"]) if is_named else (DEFAULT_METHOD, {})
    kind = method_class(method)
    said = walked(document, where, kind)
    bases = [ModelRef.parse(base) for base in said.bases]
    base, outer = (bases[0] if bases else None), bases[1:]
    if base is None and kind.base == "required":
        raise RecipeError(
            f"{where} has no base_model: the model that the experts were trained from."
        )
    notes = list(said.notes)
    models = [_model(entry) for entry in said.models]
    experts = tuple(ref for ref in models if not _is(ref, base))
    listed_base = next((ref for ref in models if _is(ref, base)), None)
    parameters = preset | {
        key: before(setting, preset.get(key)) for key, setting in said.parameters.items()
    }
    if not experts and base is not None and (kind.base == "input" or base.on is not None):
        # One model alone: copied, scaled, or an adapter put into its base.
        experts = (listed_base or base,)
        if kind.base != "input":
            notes.append(f"{method} has nothing to merge: {base} is written as it is")
            method, parameters, kind = "passthrough", {}, method_class("passthrough")
            experts = (base,)
        base = listed_base = None
    if not experts:
        raise RecipeError(
            f"{where} lists no expert: every model under 'models' is the base itself."
        )
    named = {ref.on for ref in experts if ref.on is not None}
    if base is None and kind.base == "input" and len(named) == 1:
        base = ModelRef.parse(named.pop())
        listed_base = next((ref for ref in experts if _is(ref, base)), None)
        experts = tuple(ref for ref in experts if not _is(ref, base))
    takes_part = listed_base is not None and kind.base == "input"
    counts_there = method == "karcher" or (method == "linear" and "weight" in said.parameters)
    if said.bases and said.layers is None and counts_there and not takes_part:
        notes.append(
            f"the base takes no part in {method}, for it is not under 'models'; mergekit adds it "
            "to them. List it to count it"
        )
    if listed_base is not None and not takes_part and listed_base.own():
        notes.append(f"the base's own {listed(listed_base.own())} has no effect in {method}")
    tokenizer = tokenizer_of(document)
    if base is not None and outer and not _is(outer[0], base):
        notes.append(
            f"base_model of the recipe, {outer[0]}, gives no weights: the slice has its own"
        )
        if tokenizer is not None and tokenizer.source == "base":
            tokenizer = replace(tokenizer, source=outer[0])
    return Recipe(
        listed_base if takes_part else base,
        experts,
        method,
        parameters,
        checked_dtype(document.get("out_dtype") or document.get("dtype")),
        base_listed=takes_part,
        layers=said.layers,
        notes=tuple(dict.fromkeys(notes)),
        tokenizer=tokenizer,
        chat_template=chat_template_of(document),
        generation_config=generation_config_of(document),
        chosen_by="recipe" if is_named else "default",
    )


def _method(name: object) -> tuple[str, dict[str, str]]:
    """Return name and preset of a method."""
    if not isinstance(name, str):
        raise RecipeError(f"merge_method must be a name, not {shown(name)}.")
    return parse_method(name)


def _model(entry: Entry) -> ModelRef:
    own = dict(entry.parameters)
    weight = checked_weight(own.pop("weight")) if is_plain(own.get("weight")) else None
    return replace(ModelRef.parse(entry.model, weight=weight), parameters=own)


def _is(ref: ModelRef, other: ModelRef | None) -> bool:
    """Return whether two references name one model: an adapter on another base is another."""
    return other is not None and (ref.on, ref.place) == (other.on, other.place)
