"""What the options of the command line ask for: a recipe, options, a publication."""

import argparse
import os
import shlex

from ..errors import RecipeError, Remedy
from ..experts.group import built_in_folders, on_this_machine
from ..planning.options import Options
from ..planning.plan import Plan, RefusedPlan, plan_merge
from ..planning.recipe_file import chat_template_of
from ..planning.recipe_places import recipe_at
from ..planning.request import Request
from ..recipe import Recipe, override
from ..sinks.publication import FLAGS, Publication


def recipe_of(args: argparse.Namespace) -> Recipe:
    """Return the recipe that the arguments name, with the options put over it."""
    parameters = {}
    for text in args.set:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise RecipeError(f"--set {text!r} must be KEY=VALUE, such as --set rank=2.")
        parameters[key] = value
    if args.recipe in built_in_folders():
        raise RecipeError(
            f"{args.recipe!r} is a model, and stands where a recipe would. If it is an expert, "
            f"write --expert {args.recipe}."
        )
    try:
        begun = recipe_at(args.recipe) if args.recipe else None
    except RecipeError as exc:
        if args.expert and os.path.isdir(os.path.expanduser(args.recipe)):
            raise RecipeError(
                f"{args.recipe!r} stands without an option, and holds no recipe. If it is an "
                f"expert, write --expert {shlex.quote(args.recipe)}."
            ) from exc
        raise
    recipe = override(
        begun,
        base=args.base,
        experts=args.expert,
        method=args.method,
        parameters=parameters,
        dtype=args.dtype,
        tokenizer_source=args.tokenizer_source,
        chat_template=chat_template_of({"chat_template": args.chat_template}),
        generation_config=args.generation_config,
    )
    return on_this_machine(recipe)


def options_of(args: argparse.Namespace) -> Options:
    """Return how to run it."""
    return Options.parsed(vars(args))


def request_of(args: argparse.Namespace) -> Request:
    """Return the merge that the arguments ask for."""
    return Request(
        recipe=recipe_of(args), options=options_of(args), publication=publication_of(args)
    )


def plan_of(args: argparse.Namespace) -> Plan | RefusedPlan:
    """Return the plan of what the arguments ask for."""
    asked = request_of(args)
    return plan_merge(
        asked.recipe,
        asked.options,
        out=args.out,
        publication=asked.publication,
        work_dir=args.work_dir,
        update=args.update,
    )


def publication_of(args: argparse.Namespace) -> Publication | None:
    """Return where to publish, or None.

    Raises:
        RecipeError: it is said how but not where.
    """
    if not args.push_to:
        if args.update and not args.out:
            raise RecipeError("nothing to replace.", Remedy.GIVE_TARGET)
        for flag in FLAGS:
            if flag.field != "update" and getattr(args, flag.key):
                raise RecipeError(f"{flag.word} says how to publish: give --push-to as well.")
        return None
    return Publication.of_flags(vars(args))
