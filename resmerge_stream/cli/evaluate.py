"""The command ``evaluate``: models asked the same questions."""

import argparse
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import RecipeError
from . import console
from .lasting_imports import lasting_imports

if TYPE_CHECKING:
    from ..evaluation.run import Examination


def examination_of(args: argparse.Namespace, out: str) -> "Examination":
    """Return the questions of a command, whose answers are kept in a folder.

    Raises:
        RecipeError: there are no such questions.
    """
    with lasting_imports():
        from ..evaluation.run import Examination

    names = [name.strip() for name in args.tasks.split(",") if name.strip()]
    how = {"device": args.device, "engine": args.engine}
    return Examination(names, out=out, limit=args.limit, **how, say=console.say)


def evaluate(args: argparse.Namespace) -> int:
    """Run ``evaluate`` and return its exit code.

    Raises:
        ResMergeError: it was refused, or stopped.
    """
    if args.card and args.card not in args.models:
        raise RecipeError(f"{args.card} is not among the models that are asked.")
    if args.job:
        # Packing this tool as a wheel is nothing that other commands wait for.
        from .evaluation_job import evaluate_as_job

        return evaluate_as_job(args)
    if args.flavor or args.timeout or args.yes:
        raise RecipeError("--flavor, --timeout and --yes say how a Job runs: give --job as well.")
    with lasting_imports():
        from ..evaluation.card import into_card
        from ..evaluation.run import evaluate_models

    examination = examination_of(args, args.out)
    document = evaluate_models(args.models, examination)
    if args.card and os.path.isdir(os.path.expanduser(args.card)):
        into_card(args.card, args.card, document)
    elif args.card:
        from ..evaluation.proposal import propose

        page = propose(args.card, document, examination.datasets, name=args.card)
        console.say(f"proposed for the card: {page}")
    if args.json:
        print(json.dumps({"event": "evaluated", **document}))
        return 0
    table = Path(args.out).expanduser() / "evaluation.md"
    print(table.read_text(encoding="utf-8"), end="")
    return 0
