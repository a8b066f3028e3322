"""The command ``evaluate --job``: base, experts and merge asked on one of the Hub's machines."""

import argparse

from ..errors import RecipeError
from ..evaluation.proposal import merge_at
from ..hub.jobs import HubJobs
from ..jobs.evaluation import JobEvaluation
from ..jobs.submission import refuse_folders
from .job import Show, follow, run_errand


def evaluate_as_job(args: argparse.Namespace) -> int:
    """Run ``evaluate --job`` and return its exit code.

    Raises:
        ResMergeError: it was refused, or could not be followed.
    """
    if not args.card:
        raise RecipeError(
            "a Job puts its results into a pull request on the merge. Name that model with --card."
        )
    refuse_folders(args.models)
    show = Show(as_json=args.json)
    models = list(dict.fromkeys(args.models))
    names = [name.strip() for name in args.tasks.split(",") if name.strip()]
    how = {"limit": args.limit, "device": args.device, "engine": args.engine}
    errand = JobEvaluation.of(models, args.card, names, **how, say=show.say).errand()
    merge_at(args.card)
    jobs = HubJobs()
    if running := jobs.find(errand.labels):
        show.say(f"this evaluation already runs as {jobs.page(running)}; following it.")
        return follow(jobs, running, show)
    return run_errand(jobs, errand, args, show)
