"""Where recipes are: a file, a merged model's folder, its repository on the Hub, its card."""

import os
from collections.abc import Mapping
from pathlib import Path

from ..errors import RecipeError, Remedy, shown
from ..recipe import ModelRef, Recipe, placed
from ..sinks.places import places_of
from ..sources import REPO_ID
from .recipe_file import load_recipe, parse_recipe
from .recipe_text import MAX_CARD_BYTES, MAX_RECIPE_BYTES, recipes_in_card

# What a merged model says of its recipe, the most exact first.
_FILES = ("resmerge/recipe.yml", "mergekit_config.yml", "mergekit_config.yaml")
_CARD = "README.md"
_ENDINGS = (".yml", ".yaml")


def recipe_at(place: str, *, token: str | bool | None = None) -> Recipe:
    """Return the recipe that a place holds.

    The folder of a merge that was made on this machine names its models where they were then.

    Args:
        place: a recipe file; or a merged model: its folder, its id on the Hub, or the address of
            its page or of a file there.
        token: the caller's, for the Hub; None stands for HF_TOKEN or the login,
            False for nobody's.

    Raises:
        RecipeError: there is none, several, or one that is wrong.
        StoppedError: the Hub kept failing.
    """
    path = Path(os.path.expanduser(place)) if "\x00" not in place else Path("\x01")
    if path.is_dir():
        files: dict[str, bytes] = {}
        for name in (*_FILES, _CARD):
            if (path / name).is_file():
                with (path / name).open("rb") as file:
                    data = file.read(_limit(name) + 1)
                files |= {name: data} if len(data) <= _limit(name) else {}
        return placed(_chosen(files, place), places_of(path))
    is_address = place.startswith(("https://", "http://"))
    if path.exists() or (place.endswith(_ENDINGS) and not is_address):
        return load_recipe(path)
    ref = ModelRef.parse(place) if is_address or REPO_ID.match(place) else None
    if ref is None or not REPO_ID.fullmatch(ref.id):
        return load_recipe(place)
    return recipe_on_the_hub(ref, token=token)


def recipe_on_the_hub(ref: ModelRef, *, token: str | bool | None = None) -> Recipe:
    """Return the recipe that a repository holds: its own file's, or its card's.

    Args:
        ref: the repository, with what `ModelRef.parse` reads of an address; no folder is looked at.
        token: as for `recipe_at`.

    Raises:
        RecipeError: there is none, several, or one that is wrong.
        StoppedError: the Hub kept failing.
    """
    from ..hub.client import client
    from ..hub.repo import HubRepo, listed

    repo = HubRepo(client(token), ref.id)
    info = repo.info(ref.revision or "main")
    if info is None:
        raise RecipeError(
            f"there is no repository {ref} that you can see, and no file of that name.",
            Remedy.SIGN_IN_TO_SEE,
        )
    top = ""
    names: tuple[str, ...] = (*_FILES, _CARD)
    if ref.subfolder is not None and ref.subfolder.endswith(_ENDINGS):
        names = (ref.subfolder,)
    elif ref.subfolder is not None and ref.subfolder != _CARD:
        top = f"{ref.subfolder}/"
    there = listed(info)
    for name in names:
        known = there.get(top + name)
        if known is not None and (known.size or 0) <= _limit(name):
            return _chosen({name: repo.read(top + name, info)}, str(ref))
    return _chosen({}, str(ref))


def _chosen(files: Mapping[str, bytes], place: str) -> Recipe:
    """Return the recipe that some of a model's files hold."""
    for name in files:
        if name != _CARD:
            return parse_recipe(files[name], where=f"{name} of {place}")
    card = files.get(_CARD, b"").decode("utf-8", "replace")
    if not recipes_in_card(card):
        raise RecipeError(
            f"{shown(place)} holds no recipe: neither mergekit_config.yml nor one in its card.",
            Remedy.GIVE_MODELS,
        )
    return parse_recipe(card, where=f"the card of {place}")


def _limit(name: str) -> int:
    return MAX_CARD_BYTES if name == _CARD else MAX_RECIPE_BYTES
