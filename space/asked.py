"""What a visitor asks for, checked before anything is requested: no path, no surprise."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from resmerge_stream.errors import RecipeError, shown
from resmerge_stream.planning.plan import Options
from resmerge_stream.recipe import ModelRef, Recipe
from resmerge_stream.recipe_file import MAX_RECIPE_BYTES, parse_recipe, recipe_from_dict
from resmerge_stream.sinks.publication import Publication
from resmerge_stream.sources import REPO_ID
from resmerge_stream.units import parse_size

from .examples import PREFIX, built_in_folders, is_built_in
from .settings import Settings

_OPTIONS = ("rounding", "seed", "max_shard_size", "max_shard_bytes", "tokenizer_from")


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """One merge, as it was asked for.

    Attributes:
        recipe: with the names that the web knows.
        options: output options.
        push_to: the repository to publish to; empty for files to download.
        public: what to make the repository at the end; None leaves an existing one as it is.
        update: whether a model that stands there may be replaced.
    """

    recipe: Recipe
    options: Options
    push_to: str = ""
    public: bool | None = None
    update: bool = False

    @property
    def needs_account(self) -> bool:
        """Whether only somebody with an account may run it."""
        return bool(self.push_to) or not is_built_in(self.recipe)

    @property
    def publication(self) -> Publication | None:
        """Where to publish, for the library."""
        if not self.push_to:
            return None
        return Publication(repo_id=self.push_to, public=self.public, update=self.update)

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain data, for `asked_from_dict`."""
        return {
            "recipe": self.recipe.to_dict(),
            "options": {
                "rounding": self.options.rounding,
                "seed": self.options.seed,
                "max_shard_bytes": self.options.max_shard_bytes,
                "tokenizer_from": self.options.tokenizer_from,
            },
            "push_to": self.push_to,
            "public": self.public,
            "update": self.update,
        }


def asked_from_dict(document: Mapping[str, Any], settings: Settings) -> Asked:
    """Return what a mapping asks for: a request, a record, or what a staging branch tells.

    Args:
        document: ``recipe`` in mergekit's vocabulary; ``options`` (rounding, seed,
            max_shard_size, tokenizer_from), ``push_to``, ``public`` and ``update`` may be left out.
        settings: the limits.

    Raises:
        RecipeError: something is wrong, a local path, or more than is allowed.
    """
    public, update = document.get("public"), document.get("update", False)
    push_to = document.get("push_to") or ""
    if not isinstance(public, bool | None) or not isinstance(update, bool):
        raise RecipeError("public and update must be true or false.")
    if not isinstance(push_to, str):
        raise RecipeError(f"push_to must be namespace/name, not {shown(push_to)}.")
    asked = Asked(
        recipe=web_recipe(document.get("recipe"), settings),
        options=web_options(document.get("options") or {}, settings),
        push_to=push_to.strip(),
        public=public,
        update=update,
    )
    if asked.push_to:
        _check_target(asked)
    return asked


def web_recipe(document: object, settings: Settings) -> Recipe:
    """Return the recipe in a mapping or a YAML text, without any local path in it.

    Raises:
        RecipeError: it is malformed, too large, or names something that is no repository.
    """
    if isinstance(document, str):
        if len(document.encode()) > MAX_RECIPE_BYTES:
            raise RecipeError(f"the recipe is larger than {MAX_RECIPE_BYTES} bytes.")
        recipe = parse_recipe(document)
    else:
        _check_size(document)
        recipe = recipe_from_dict(document)
    for ref in recipe.models:
        check_id(ref)
    if len(recipe.experts) > settings.max_experts:
        raise RecipeError(
            f"the recipe has {len(recipe.experts)} experts; this Space merges up to "
            f"{settings.max_experts}. Merge more from the command line."
        )
    return recipe


def check_id(ref: ModelRef) -> None:
    """Refuse a model that is neither a repository id nor one of the built-in example.

    Raises:
        RecipeError: it is such.
    """
    if ref.id.startswith(PREFIX):
        if ref.id not in built_in_folders() or ref.revision is not None:
            known = ", ".join(built_in_folders())
            raise RecipeError(f"{shown(str(ref))} is not a built-in model. There are: {known}.")
    elif not REPO_ID.fullmatch(ref.id) or os.path.exists(ref.id):
        # A folder of this machine is never read for a visitor, whatever it is called.
        raise RecipeError(
            f"{shown(ref.id)} is not a repository on the Hub. Write namespace/name, such as "
            "Qwen/Qwen2.5-7B; folders are merged from the command line."
        )


def web_options(document: object, settings: Settings) -> Options:
    """Return the output options in a mapping.

    Raises:
        RecipeError: an option is unknown or has a wrong value.
    """
    if not isinstance(document, Mapping):
        raise RecipeError(f"options must be a mapping, not {shown(document)}.")
    unknown = [key for key in document if key not in _OPTIONS]
    if unknown:
        raise RecipeError(f"unknown option {shown(unknown[0])}; there are: {', '.join(_OPTIONS)}.")
    seed = document.get("seed") or 0
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 1 << 63:
        raise RecipeError(f"seed must be a whole number from 0, not {shown(seed)}.")
    shard = document.get("max_shard_size") or document.get("max_shard_bytes")
    if not isinstance(shard, str | int | None) or isinstance(shard, bool):
        raise RecipeError(f"max_shard_size must be a size such as 5GB, not {shown(shard)}.")
    tokenizer = document.get("tokenizer_from") or None
    if tokenizer is not None:
        tokenizer = ModelRef.parse(tokenizer)
        check_id(tokenizer)
        if tokenizer.id.startswith(PREFIX):
            raise RecipeError("the built-in models share one tokenizer; leave it out.")
    return Options(
        rounding=str(document.get("rounding") or "nearest"),
        seed=seed,
        max_shard_bytes=parse_size(shard, name="max_shard_size") if shard else None,
        tokenizer_from=str(tokenizer) if tokenizer else None,
        max_header_bytes=settings.max_header_bytes,
    )


def _check_target(asked: Asked) -> None:
    if not REPO_ID.fullmatch(asked.push_to):
        raise RecipeError(
            f"{shown(asked.push_to)} is not a name for a repository: write namespace/name, with "
            "letters, digits, '-', '_' and '.'."
        )


def _check_size(document: object) -> None:
    try:
        size = len(json.dumps(document))
    except (TypeError, ValueError, RecursionError) as exc:
        raise RecipeError("the recipe must be plain data: text, numbers, lists.") from exc
    if size > MAX_RECIPE_BYTES:
        raise RecipeError(f"the recipe is larger than {MAX_RECIPE_BYTES} bytes.")
