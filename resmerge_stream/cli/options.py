"""What the options of the command line ask for: a recipe, options, a publication."""

import argparse

from ..errors import RecipeError
from ..planning.options import Options
from ..planning.recipe_places import recipe_at
from ..planning.request import Request
from ..recipe import Recipe, override
from ..sinks.publication import Publication
from ..units import parse_size


def recipe_of(args: argparse.Namespace) -> Recipe:
    """Return the recipe that the arguments name, with the options put over it."""
    parameters = {}
    for text in args.set:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise RecipeError(f"--set {text!r} must be KEY=VALUE, such as --set rank=2.")
        parameters[key] = value
    return override(
        recipe_at(args.recipe) if args.recipe else None,
        base=args.base,
        experts=args.expert,
        method=args.method,
        parameters=parameters,
        dtype=args.dtype,
        tokenizer_source=args.tokenizer_source,
    )


def options_of(args: argparse.Namespace) -> Options:
    """Return how to run it."""
    return Options.parsed(vars(args))


def request_of(args: argparse.Namespace) -> Request:
    """Return the merge that the arguments ask for."""
    return Request(
        recipe=recipe_of(args), options=options_of(args), publication=publication_of(args)
    )


def publication_of(args: argparse.Namespace) -> Publication | None:
    """Return where to publish, or None.

    Raises:
        RecipeError: it is said how but not where.
    """
    if not args.push_to:
        for option in (
            "private", "public", "update", "create_pr", "collection", "discuss", "max_disk",
        ):  # fmt: skip
            if getattr(args, option):
                name = option.replace("_", "-")
                raise RecipeError(f"--{name} says how to publish: give --push-to as well.")
        return None
    return Publication(
        repo_id=args.push_to,
        public=True if args.public else False if args.private else None,
        update=args.update,
        create_pr=args.create_pr,
        collection=args.collection or "",
        discuss=args.discuss,
        max_disk=parse_size(args.max_disk, name="max-disk") if args.max_disk else None,
    )
