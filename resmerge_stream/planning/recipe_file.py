"""Recipe files in mergekit's vocabulary: from a file, a text or plain data to a recipe.

The keys of tokens and talk are read here too: tokenizer, chat template, generation config.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..errors import RecipeError, Remedy, listed, shown
from ..methods import method_class
from ..methods.settings import before, checked_weight, is_plain, switch, whole_number
from ..recipe import (
    DEFAULT_METHOD,
    ModelRef,
    Recipe,
    Tokenizer,
    TokenRow,
    checked_dtype,
    parse_method,
)
from .chat_templates import TEMPLATES
from .levels import walked
from .recipe_text import MAX_CARD_BYTES, MAX_RECIPE_BYTES, document_of

__all__ = ["MAX_RECIPE_BYTES", "load_recipe", "parse_recipe", "recipe_from_dict"]

MAX_TOKENS = 10_000
MAX_TEMPLATE = 20_000


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
    method, preset = DEFAULT_METHOD, dict[str, str]()
    if is_named:
        if not isinstance(document["merge_method"], str):
            raise RecipeError(
                f"merge_method must be a name, not {shown(document['merge_method'])}."
            )
        method, preset = parse_method(document["merge_method"])
    kind = method_class(method)
    said = walked(document, where, kind)
    bases = [ModelRef.parse(base) for base in said.bases]
    base, outer = (bases[0] if bases else None), bases[1:]
    if base is None and kind.base == "required":
        raise RecipeError(
            f"{where} has no base_model: the model that the experts were trained from."
        )
    notes = list(said.notes)
    models = []
    for entry in said.models:
        own = dict(entry.parameters)
        weight = checked_weight(own.pop("weight")) if is_plain(own.get("weight")) else None
        models.append(replace(ModelRef.parse(entry.model, weight=weight), parameters=own))
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


def _is(ref: ModelRef, other: ModelRef | None) -> bool:
    """Return whether two references name one model: an adapter on another base is another."""
    return other is not None and (ref.on, ref.place) == (other.on, other.place)


def tokenizer_of(document: Mapping[Any, Any]) -> Tokenizer | None:
    """Return what a recipe says of the tokenizer; None where the base's is copied as it is.

    Raises:
        RecipeError: a key or a value is wrong.
    """
    source, said = document.get("tokenizer_source"), document.get("tokenizer")
    if source is not None and said is not None:
        raise RecipeError("a recipe has either 'tokenizer_source' or 'tokenizer', not both.")
    if source is not None:
        return Tokenizer(_source(source))
    if said is None:
        return None
    if not isinstance(said, Mapping):
        raise RecipeError(
            f"tokenizer must be a mapping with 'source' and 'tokens', not {shown(said)}."
        )
    known = ("source", "tokens", "pad_to_multiple_of")
    if unknown := [key for key in said if key not in known]:
        raise RecipeError(
            f"unknown key {shown(unknown[0])} in 'tokenizer'; there are: {', '.join(known)}."
        )
    multiple = said.get("pad_to_multiple_of")
    if multiple is not None and not 1 <= (whole_number(multiple) or 0) <= 1 << 16:
        raise RecipeError(f"pad_to_multiple_of must be a whole number, not {shown(multiple)}.")
    # mergekit's default of 'tokenizer' is union, of a recipe without it the base's.
    source = _source(said.get("source", "union"))
    tokens = {} if said.get("tokens") is None else said["tokens"]
    if not isinstance(tokens, Mapping) or len(tokens) > MAX_TOKENS:
        raise RecipeError(f"tokens must map tokens to their sources, not {shown(tokens)}.")
    for token in tokens:
        if not isinstance(token, str) or not token:
            raise RecipeError(f"a token must be text, not {shown(token)}; put it in quotes.")
    rows = tuple((token, _row(token, row)) for token, row in tokens.items())
    return Tokenizer(source, rows, whole_number(multiple))


def chat_template_of(document: Mapping[Any, Any]) -> str | None:
    """Return a recipe's chat template: ``auto``, a name or Jinja; None where it says nothing.

    Raises:
        RecipeError: it is none of these.
    """
    template = document.get("chat_template")
    if template is None:
        return None
    if not isinstance(template, str) or len(template) > MAX_TEMPLATE:
        raise RecipeError(f"chat_template must be 'auto' or a template, not {shown(template)}.")
    if template != "auto" and template not in TEMPLATES and "{" not in template:
        raise RecipeError(
            f"chat_template {shown(template)} is neither a template nor the name of one. There are "
            f"{listed(TEMPLATES)}, and 'auto' for the one that most of the models have."
        )
    return template


def generation_config_of(document: Mapping[Any, Any]) -> ModelRef | None:
    """Return the model whose generation config a recipe takes; None where it says none.

    Raises:
        RecipeError: it is no model.
    """
    said = document.get("generation_config")
    return None if said is None else ModelRef.parse(said)


def _source(said: object) -> str | ModelRef:
    if said in ("base", "union"):
        return str(said)
    return ModelRef.parse(said)


def _row(token: object, said: object) -> TokenRow:
    if not isinstance(said, Mapping) or set(said) - {"source", "force"}:
        raise RecipeError(
            f"token {shown(token)} must have 'source' and 'force', not {shown(said)}."
        )
    force = switch(said.get("force", False))
    if force is None:
        raise RecipeError(f"'force' of token {shown(token)} must be true or false.")
    source = said.get("source")
    if source is None:
        if force:
            raise RecipeError(f"token {shown(token)} has 'force', but no 'source' of its row.")
        return TokenRow()
    if isinstance(source, str) or (isinstance(source, Mapping) and "kind" not in source):
        return TokenRow(ModelRef.parse(source), force=force)
    if isinstance(source, Mapping) and source.get("kind") == "zero" and len(source) == 1:
        return TokenRow(zero=True, force=force)
    if isinstance(source, Mapping) and source.get("kind") == "model_token":
        other, number = source.get("token"), whole_number(source.get("token_id"))
        is_one = (
            isinstance(other, str)
            if source.get("token_id") is None
            else other is None and number is not None and number >= 0
        )
        if is_one and not set(source) - {"kind", "model", "token", "token_id"}:
            model = ModelRef.parse(source.get("model"))
            return TokenRow(model, token=other, token_id=number, force=force)
    raise RecipeError(
        f"the source of token {shown(token)} must be a model, '{{kind: zero}}', or '{{kind: "
        f"model_token, model: …, token: …}}', not {shown(source)}."
    )
