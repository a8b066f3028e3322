"""The options of the command line, and what they mean: a recipe, options, a publication."""

import argparse
from typing import Any

from ..errors import RecipeError
from ..planning.options import Declared, Options, declared
from ..planning.recipe_places import recipe_at
from ..planning.request import Request
from ..recipe import Recipe, override
from ..sinks.publication import Publication
from ..specs import OUTPUT_DTYPES
from ..units import parse_size


def add_json(parser: argparse.ArgumentParser) -> None:
    """Add ``--json``."""
    parser.add_argument("--json", action="store_true", help="print JSON, one object a line")


def add_publication(parser: argparse.ArgumentParser) -> None:
    """Add what says where on the Hub to publish, and how."""
    hub = parser.add_argument_group("publish on the Hub, with HF_TOKEN or its login")
    hub.add_argument(
        "--push-to", metavar="NS/NAME", help="the repository; a new one is made private"
    )
    seen = hub.add_mutually_exclusive_group()
    seen.add_argument(
        "--private", action="store_true", help="keep it private (default for a new one)"
    )
    seen.add_argument(
        "--public", action="store_true", help="make it public when everything is there"
    )
    hub.add_argument(
        "--update",
        action="store_true",
        help="replace the model that is there; the plan lists the files",
    )
    hub.add_argument(
        "--create-pr",
        action="store_true",
        help="open a pull request on it instead; nothing else there is touched",
    )
    hub.add_argument(
        "--collection", metavar="OWNER/SLUG", help="add the model to this collection of yours"
    )
    hub.add_argument(
        "--discuss", action="store_true", help="open a discussion there when it is done"
    )
    hub.add_argument(
        "--max-disk",
        metavar="SIZE",
        help="disk for unsent shards (default: two for each process); 0: no files",
    )
    parser.add_argument(
        "--work-dir",
        metavar="DIR",
        help="where to keep what a restart needs (default: the user's cache)",
    )


def add_recipe(parser: argparse.ArgumentParser) -> None:
    """Add what says what to merge, and how."""
    parser.add_argument(
        "recipe", nargs="?", metavar="RECIPE",
        help="a file in mergekit's vocabulary; or a merged model: folder, id or address",
    )  # fmt: skip
    what = parser.add_argument_group("instead of a recipe, or over it")
    what.add_argument(
        "--base", metavar="ID", help="the base model: a folder or namespace/name[@revision]"
    )
    what.add_argument(
        "--expert", metavar="ID", action="append", default=[], help="an expert; give one for each"
    )
    what.add_argument(
        "--method", metavar="NAME", help="how to merge (default: resmerge); 'methods' lists them"
    )
    what.add_argument(
        "--set",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        help="a parameter of the method; give one for each",
    )
    what.add_argument(
        "--tokenizer-source", metavar="WHICH",
        help="base, union or an ID: the models' rows are matched by token",
    )  # fmt: skip
    how = parser.add_argument_group("output")
    how.add_argument(
        "--dtype", metavar="TYPE", help=f"{', '.join(OUTPUT_DTYPES)} (default: the base's)"
    )
    for known in declared():
        if known.changes != "nothing":
            _add(how, known)
    add_machine(parser)
    add_json(parser)


def add_machine(parser: argparse.ArgumentParser) -> None:
    """Add what changes nothing that is written."""
    machine = parser.add_argument_group("machine")
    for known in declared():
        if known.changes == "nothing":
            _add(machine, known)


def _add(group: Any, known: Declared) -> None:
    if known.default is True:
        group.add_argument(
            known.flag, dest=known.key, action="store_const", const=False, help=known.help
        )
        return
    kind = int if type(known.default) is int else str
    group.add_argument(known.flag, metavar=known.metavar, type=kind, help=known.help)


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


def add_submit(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``submit``."""
    add_recipe(parser)
    add_publication(parser)
    job = parser.add_argument_group("the Job")
    job.add_argument(
        "--flavor", metavar="NAME", help="which machine (default: the cheapest that fits)"
    )
    job.add_argument(
        "--timeout",
        metavar="TIME",
        help="end the Job after, such as 2h (default: from the estimate)",
    )
    job.add_argument(
        "--yes", action="store_true", help="start without asking whether the price is right"
    )
    job.add_argument(
        "--attach", metavar="JOB_ID", help="follow a Job that runs or ran; takes no recipe"
    )
