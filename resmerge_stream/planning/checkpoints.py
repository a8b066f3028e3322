"""Checkpoints of one run: a pattern in a model's name becomes the models, in the order of steps."""

import glob
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from ..errors import RecipeError, Remedy, listed, shown
from ..methods import checked_value, method_class, parameter_fields
from ..recipe import BUCKETS, ModelRef, Recipe
from ..sources import REPO_ID
from ..sources.trainers import model_folders

# More than a run keeps; a pattern that fits more was not meant so.
MOST_CHECKPOINTS = 1000
_WINDOW = re.compile(r"(\d*):(\d*)")
_DIGITS = re.compile(r"(\d{1,18})")
_STEP = re.compile(r"(?:step|checkpoint|ckpt|iter|epoch)[^0-9]?(\d{1,18})", re.IGNORECASE)


def with_checkpoints(
    recipe: Recipe, *, token: str | bool | None = None, most: int = MOST_CHECKPOINTS
) -> Recipe:
    """Return the recipe with every pattern replaced by the checkpoints that fit it, by step.

    ``org/run@step_*`` are branches and tags, ``org/run:checkpoint-*`` folders of a repository,
    ``hf://buckets/org/run/checkpoint-*`` folders of a bucket, ``runs/checkpoint-*`` folders; ``*``
    and ``?`` stand for anything but a slash. Parameters of a pattern are those of each of its
    checkpoints. `average` takes checkpoints that are listed one by one, and differ by a number
    only, in the order of that number.

    Args:
        recipe: as written.
        token: the caller's, for the Hub.
        most: models that patterns may stand for.

    Raises:
        RecipeError: nothing fits a pattern, or too much does; or `last` or `window` leave nothing.
        StoppedError: the Hub kept failing.
    """
    if any(is_pattern(ref) for ref in recipe.named if ref not in recipe.experts):
        raise RecipeError("a pattern stands for several models, and can only be an expert.")
    notes = list(recipe.notes)
    experts: list[ModelRef] = []
    parameters = recipe.parameters
    for ref in recipe.experts:
        experts += _fitting(ref, token, notes) if is_pattern(ref) else [ref]
    if recipe.method == "average":
        experts, parameters = _of_interest(_by_number(experts), recipe)
    if len(experts) > max(most, len(recipe.experts)):
        raise RecipeError(
            f"the recipe's patterns stand for {len(experts)} models; at most {most} are merged "
            "here. Write narrower ones, or take the last of them by `average` and `last`."
        )
    return replace(
        recipe, experts=tuple(experts), parameters=parameters, notes=tuple(dict.fromkeys(notes))
    )


def is_pattern(ref: ModelRef) -> bool:
    """Return whether a model's name stands for several; a folder of that very name is a model."""
    named = "".join(part or "" for part in ref.place)
    return ("*" in named or "?" in named) and not os.path.isdir(os.path.expanduser(ref.id))


def step_of(ref: ModelRef) -> int | None:
    """Return the step in a checkpoint's name; None where it has no number.

    It is the number after a word for step or checkpoint, or else the last one.
    """
    name = _varying(ref).rstrip("/").rpartition("/")[2]
    numbers = _STEP.findall(name) or _DIGITS.findall(name)
    return int(numbers[-1]) if numbers else None


def _varying(ref: ModelRef) -> str:
    return ref.subfolder or ref.revision or ref.id


def _fitting(ref: ModelRef, token: str | bool | None, notes: list[str]) -> list[ModelRef]:
    """Return the models that fit a pattern, by step; of others it is noted that they stay out."""
    if (place := ref.in_bucket) is not None:
        bucket, pattern = place
        names = _in_bucket(bucket, pattern, token)
        found = [replace(ref, id=f"{BUCKETS}{bucket}/{name}") for name in names]
    elif not REPO_ID.fullmatch(ref.id):
        names = sorted(filter(os.path.isdir, glob.iglob(os.path.expanduser(ref.id))))
        found = [replace(ref, id=name) for name in names]
    elif ref.subfolder is not None and is_pattern(replace(ref, revision=None)):
        if ref.revision is not None and is_pattern(replace(ref, subfolder=None)):
            raise RecipeError(f"{ref}: the revision or the folder may be a pattern, not both.")
        found = [replace(ref, subfolder=name) for name in _folders(ref, token)]
    else:
        found = [replace(ref, revision=name) for name in _revisions(ref, token)]
    steps = [one for one in found if step_of(one) is not None]
    if not steps:
        raise RecipeError(f"no checkpoint fits {shown(str(ref))}.", Remedy.CHECK_FOLDER)
    if others := [str(one) for one in found if one not in steps]:
        notes.append(f"without a step in their names, and left out: {listed(others, limit=3)}")
    return sorted(steps, key=lambda one: (step_of(one), _varying(one)))


def _revisions(ref: ModelRef, token: str | bool | None) -> list[str]:
    from ..hub.client import client
    from ..hub.repo import HubRepo

    return _that_fit(ref.revision or "", HubRepo(client(token), ref.id).revisions())


def _folders(ref: ModelRef, token: str | bool | None) -> list[str]:
    from ..hub.client import client
    from ..hub.repo import HubRepo, listed

    info = HubRepo(client(token), ref.id).info(ref.revision or "main")
    if info is None:
        raise RecipeError(f"there is no repository {ref} that you can see.", Remedy.SIGN_IN_TO_SEE)
    return _that_fit(ref.subfolder or "", model_folders(listed(info)))


def _in_bucket(bucket_id: str, pattern: str, token: str | bool | None) -> list[str]:
    from ..hub.buckets import HubBucket
    from ..hub.client import NoSuchRepositoryError, client

    fixed = re.split("[*?]", pattern)[0].rpartition("/")[0]
    try:
        files = HubBucket(client(token), bucket_id).files(fixed)
    except NoSuchRepositoryError as exc:
        raise RecipeError(exc.notices[0]) from exc
    return _that_fit(pattern, model_folders(files))


def _that_fit(pattern: str, names: Iterable[str]) -> list[str]:
    parts = re.split(r"([*?])", pattern)
    wild = {"*": "[^/]*", "?": "[^/]"}
    form = re.compile("".join(wild.get(part) or re.escape(part) for part in parts))
    return [name for name in dict.fromkeys(names) if form.fullmatch(name)]


def _by_number(refs: Sequence[ModelRef]) -> list[ModelRef]:
    """Return checkpoints by number where nothing else tells their names apart, else as listed."""
    split = {ref: _DIGITS.split(str(ref)) for ref in refs}
    if len({tuple(parts[::2]) for parts in split.values()}) != 1:
        return list(refs)
    return sorted(refs, key=lambda ref: [int(number) for number in split[ref][1::2]])


def _of_interest(refs: list[ModelRef], recipe: Recipe) -> tuple[list[ModelRef], dict[str, Any]]:
    """Return the checkpoints that `last` and `window` leave, and the parameters without these."""
    fields = parameter_fields(method_class(recipe.method))
    given = {key: recipe.parameters[key] for key in ("window", "last") if key in recipe.parameters}
    window, last = (
        checked_value(key, given.get(key, fields[key].default), fields[key])
        for key in ("window", "last")
    )
    if window:
        bounds = _WINDOW.fullmatch(window)
        if bounds is None:
            raise RecipeError(f"window must be FIRST:LAST in steps, not {shown(window)}.")
        first, final = int(bounds[1] or 0), int(bounds[2]) if bounds[2] else None
        steps = {ref: step_of(ref) for ref in refs}
        if nameless := [str(ref) for ref, step in steps.items() if step is None]:
            raise RecipeError(
                f"a window of steps is given, and {listed(nameless, limit=3)} tells none."
            )
        refs = [
            ref
            for ref, step in steps.items()
            if step is not None and first <= step and (final is None or step <= final)
        ]
        if not refs:
            raise RecipeError(f"no checkpoint lies in the window {window}.")
    rest = {key: value for key, value in recipe.parameters.items() if key not in given}
    return refs[-last:] if last else refs, rest
