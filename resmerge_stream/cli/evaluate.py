"""The command ``evaluate``: models asked the same questions, here or as a Job."""

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import RecipeError
from ..experts.group import built_in_folders
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
    # A command that merges too has no value for what was not given.
    how = {"device": args.device or "auto", "engine": args.engine}
    return Examination(names, out=out, limit=args.limit, **how, say=console.say)


def evaluate(args: argparse.Namespace) -> int:
    """Run ``evaluate`` and return its exit code.

    Raises:
        ResMergeError: it was refused, or stopped.
    """
    if args.card and args.card not in args.models:
        raise RecipeError(f"{args.card} is not among the models that are asked.")
    if args.job:
        return _as_job(args)
    if args.flavor or args.timeout or args.yes:
        raise RecipeError("--flavor, --timeout and --yes say how a Job runs: give --job as well.")
    with lasting_imports():
        from ..evaluation.card import into_card
        from ..evaluation.run import evaluate_models

    examination = examination_of(args, args.out)
    folders = built_in_folders()
    places = {name: folders.get(name, name) for name in args.models}
    document = evaluate_models(places, examination)
    if args.card and os.path.isdir(os.path.expanduser(args.card)):
        into_card(args.card, args.card, document)
    elif args.card:
        from ..evaluation.proposal import propose

        page = propose(args.card, document, examination.datasets, name=args.card)
        console.say(f"proposed for the card: {page}")
    if args.json:
        console.tell({"event": "evaluated", **document})
        return 0
    table = Path(args.out).expanduser() / "evaluation.md"
    print(table.read_text(encoding="utf-8"), end="")
    return 0


def _as_job(args: argparse.Namespace) -> int:
    # Packing this tool as a wheel is nothing that other commands wait for.
    from ..evaluation.proposal import merge_at
    from ..hub.jobs import HubJobs
    from ..jobs.evaluation import evaluation_job
    from ..jobs.job import refuse_folders
    from .job import Show, follow, run_job

    if not args.card:
        raise RecipeError(
            "a Job puts its results into a pull request on the merge. Name that model with --card."
        )
    refuse_folders(args.models)
    show = Show(as_json=args.json)
    models = list(dict.fromkeys(args.models))
    names = [name.strip() for name in args.tasks.split(",") if name.strip()]
    how = {"limit": args.limit, "device": args.device, "engine": args.engine}
    job = evaluation_job(models, args.card, names, **how, say=show.say)
    merge_at(args.card)
    hub = HubJobs()
    if running := hub.find(job.labels):
        show.say(f"this evaluation already runs as {hub.page(running)}; following it.")
        return follow(hub, running, show)
    return run_job(hub, job, args, show)
