"""What a visitor asks for, checked before anything is requested: no path, no surprise."""

import json
import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from resmerge_stream.errors import Notice, RecipeError, shown
from resmerge_stream.experts.group import PREFIX, built_in_folders
from resmerge_stream.planning.recipe_file import MAX_RECIPE_BYTES
from resmerge_stream.planning.request import Request
from resmerge_stream.recipe import ModelRef, Recipe
from resmerge_stream.sources import REPO_ID

from .examples import is_built_in
from .settings import Settings


def web_request(document: Mapping[str, Any], settings: Settings) -> Request:
    """Return what a mapping asks for: a form, a record, or what a staging branch tells.

    Args:
        document: as for `Request.from_dict`.
        settings: the limits.

    Raises:
        RecipeError: something is wrong, a local path, or more than is allowed.
    """
    asked = document.get("recipe")
    try:
        text = asked if isinstance(asked, str) else json.dumps(asked)
    except (TypeError, ValueError, RecursionError) as exc:
        raise RecipeError("the recipe must be plain data: text, numbers, lists.") from exc
    if len(text.encode(errors="replace")) > MAX_RECIPE_BYTES:
        raise RecipeError(f"the recipe is larger than {MAX_RECIPE_BYTES} bytes.")
    request = Request.from_dict(document)
    recipe, options = request.recipe, request.options
    wrong: dict[str, Notice] = {}
    for ref in recipe.named:
        try:
            check_id(ref)
        except RecipeError as exc:
            wrong.setdefault(str(ref), exc.notices[0])
    if wrong:
        raise RecipeError.of(wrong.values())
    if len(recipe.experts) > settings.max_experts:
        raise RecipeError(
            f"the recipe has {len(recipe.experts)} experts; this Space merges up to "
            f"{settings.max_experts}. Merge more from the command line."
        )
    if not 0 <= options.seed < 1 << 63:
        raise RecipeError(f"seed must be a whole number from 0, not {shown(options.seed)}.")
    if options.tokenizer_from is not None:
        tokenizer = ModelRef.parse(options.tokenizer_from)
        check_id(tokenizer)
        if tokenizer.id.startswith(PREFIX):
            raise RecipeError("the built-in models share one tokenizer; leave it out.")
    options = replace(
        options, max_header_bytes=settings.max_header_bytes, max_experts=settings.max_experts
    )
    return replace(request, options=options)


def needs_account(request: Request) -> bool:
    """Return whether only somebody with an account may run it."""
    return request.publication is not None or not is_built_in(request.recipe)


def web_recipe(document: object, settings: Settings) -> Recipe:
    """Return the recipe in a mapping or a YAML text, without any local path in it.

    Raises:
        RecipeError: it is malformed, too large, or names something that is no repository.
    """
    return web_request({"recipe": document}, settings).recipe


def models_on_hub(recipe: Mapping[str, Any]) -> list[str]:
    """Return base and experts of a recipe as plain data; empty where one is not on the Hub.

    The built-in example's names look like ids, and no repository has them.
    """
    models = recipe.get("models")  # a stranger's report may say anything there
    given = models if isinstance(models, list) else []
    listed = [m.get("model") if isinstance(m, dict) else m for m in given]
    names = [str(name) for name in (recipe.get("base_model"), *listed) if name]
    on_hub = all(
        REPO_ID.fullmatch(name.partition("@")[0]) and not name.startswith(PREFIX) for name in names
    )
    return list(dict.fromkeys(names)) if on_hub else []


def check_id(ref: ModelRef) -> None:
    """Refuse a model that is neither a repository id nor one of the built-in example.

    Raises:
        RecipeError: it is such.
    """
    if ref.id.startswith(PREFIX):
        if ref.id not in built_in_folders() or ref.place != (ref.id, None, None):
            known = ", ".join(built_in_folders())
            raise RecipeError(f"{shown(str(ref))} is not a built-in model. There are: {known}.")
    elif not REPO_ID.fullmatch(ref.id) or os.path.exists(ref.id):
        # A folder of this machine is never read for a visitor, whatever it is called.
        raise RecipeError(
            f"{shown(ref.id)} is not a repository on the Hub. Write namespace/name, such as "
            "Qwen/Qwen2.5-7B; folders are merged from the command line."
        )
