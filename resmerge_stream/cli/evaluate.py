"""The command ``evaluate``: models asked the same questions."""

import argparse
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

from . import console
from .lasting_imports import lasting_imports

if TYPE_CHECKING:
    from ..evaluation.run import Examination


def add_evaluate(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``evaluate``."""
    parser.add_argument(
        "models", nargs="+", metavar="MODEL", help="folder or namespace/name[@revision]; base first"
    )
    add_questions(parser, required=True)
    parser.add_argument(
        "--out",
        metavar="DIR",
        default="evaluation",
        help="the folder for results and for the answers so far",
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    parser.add_argument(
        "--card",
        metavar="MERGE",
        help="put the results into the card of this one of the models; on the Hub, by a "
        "pull request",
    )
    parser.add_argument("--json", action="store_true", help="print JSON, one object a line")


def add_questions(parser: argparse._ActionsContainer, *, required: bool) -> None:
    """Add ``--tasks`` and ``--limit``."""
    parser.add_argument(
        "--tasks",
        required=required,
        metavar="A,B,C",
        help="built-in tasks (add, sort, reverse, close), files FILE.jsonl or FILE.yaml, or tasks "
        "of lm-evaluation-harness",
    )
    parser.add_argument(
        "--limit", metavar="N", type=int, default=500, help="questions for each task (default: 500)"
    )


def examination_of(args: argparse.Namespace, out: str) -> "Examination":
    """Return the questions of a command, whose answers are kept in a folder.

    Raises:
        RecipeError: there are no such questions.
    """
    from ..errors import RecipeError

    if args.limit < 1:
        raise RecipeError(f"a task needs at least one question, not {args.limit}.")
    with lasting_imports():
        from ..evaluation.run import Examination

    names = [name.strip() for name in args.tasks.split(",") if name.strip()]
    return Examination(names, out=out, limit=args.limit, device=args.device, say=console.say)


def evaluate(args: argparse.Namespace) -> int:
    """Run ``evaluate`` and return its exit code.

    Raises:
        ResMergeError: it was refused, or stopped.
    """
    from ..errors import RecipeError

    if args.card and args.card not in args.models:
        raise RecipeError(f"{args.card} is none of the models that are asked.")
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
