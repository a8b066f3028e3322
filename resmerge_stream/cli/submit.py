"""The command ``submit``: plan here, then merge as a Job, and evaluate there what was merged."""

import argparse
from typing import TYPE_CHECKING

from ..errors import JobRefusedError, RecipeError
from ..hub.flavors import Flavor
from ..jobs.errand import Errand
from ..jobs.submission import JobFiles, job_labels, merge_words, refuse_folders, sources_of
from ..planning.machines import largest, merge_seconds, shortage
from ..planning.plan import Plan, plan_merge
from ..units import duration, format_size
from . import console
from .job import Show, attach, follow, run_errand
from .options import request_of

if TYPE_CHECKING:
    from ..jobs.evaluation import JobEvaluation


def submit(args: argparse.Namespace) -> int:
    """Run the command and return its exit code.

    Raises:
        ResMergeError: it was refused, or could not be followed.
    """
    show = Show(as_json=args.json)
    if args.attach:
        return attach(args.attach, show)
    if not args.push_to:
        raise RecipeError("a Job publishes its result: give --push-to NAMESPACE/NAME.")
    if args.timeout:
        duration(args.timeout)  # refused before the plan takes its time
    if bool(args.tasks) != bool(args.then):
        raise RecipeError("--then evaluate and --tasks need each other: give both.")
    plan = _plan(args)
    try:
        return _submit(args, plan, show)
    finally:
        plan.close()


def _plan(args: argparse.Namespace) -> Plan:
    asked = request_of(args)
    refuse_folders(sources_of(asked))
    if args.then and (args.create_pr or asked.options.output != "model"):
        raise RecipeError(
            "--then evaluate asks a whole model at the repository's main: leave out "
            f"{'--create-pr' if args.create_pr else '--as'}."
        )
    plan = plan_merge(
        asked.recipe,
        asked.options,
        publication=asked.publication,
        work_dir=args.work_dir,
        machine=largest(),
    )
    return plan.accepted()


def _submit(args: argparse.Namespace, plan: Plan, show: Show) -> int:
    from ..hub.jobs import HubJobs

    if plan.target is None:
        raise RuntimeError("a plan with a publication has a target")
    evaluation = _evaluation(args, plan, show) if args.then else None
    if plan.target.finished and evaluation is None:
        return _finish_here(plan, show)
    jobs = HubJobs(plan.token, str(plan.target.account["name"]))
    errand = _errand(plan, evaluation)
    if running := jobs.find(errand.labels):
        show.say(f"this merge already runs as {jobs.page(running)}; following it.")
        return follow(jobs, running, show)
    if evaluation is not None and (running := jobs.find(job_labels(plan))):
        raise JobRefusedError(
            f"this merge already runs as {jobs.page(running)}, without this evaluation. Give the "
            f"same command when it has ended; submit --attach {jobs.namespace}/{running} shows it."
        )
    for warning in plan.warnings:
        show.say(f"warning: {warning}")
    return run_errand(jobs, errand, args, show)


def _evaluation(args: argparse.Namespace, plan: Plan, show: Show) -> "JobEvaluation":
    """Return what base, experts and the merge are asked once it is published.

    Raises:
        ResMergeError: a model is a folder here, or a task does not exist.
    """
    from ..evaluation.contest import models_of
    from ..jobs.evaluation import JobEvaluation

    models, target = models_of(plan), args.push_to
    refuse_folders(models)
    names = [name.strip() for name in args.tasks.split(",") if name.strip()]
    how = {"limit": args.limit, "engine": args.engine}
    return JobEvaluation.of([*models, target], target, names, **how, plan=plan, say=show.say)


def _errand(plan: Plan, evaluation: "JobEvaluation | None") -> Errand:
    summary = (
        f"plan {plan.plan_hash}: {len(plan.tensors)} tensors, {format_size(plan.read_bytes)} to "
        f"read, {format_size(plan.write_bytes)} to publish"
    )
    if evaluation is None:
        return Errand(
            what="merge",
            summary=summary,
            told={"plan_hash": plan.plan_hash},
            labels=job_labels(plan),
            seconds_on=lambda it: merge_seconds(plan, it),
            lack_of=lambda it: shortage(plan, it),
            commands=lambda files: [merge_words(plan.request, files)],
        )
    sitting, finished = evaluation.sitting, plan.target is not None and plan.target.finished

    def seconds(flavor: Flavor) -> float:
        return sitting.seconds(flavor) + (0.0 if finished else merge_seconds(plan, flavor))

    def commands(files: JobFiles) -> list[list[str]]:
        return [merge_words(plan.request, files), evaluation.words(files)]

    return Errand(
        what="merge and its evaluation",
        summary=f"{summary}\n{evaluation.summary}",
        told={"plan_hash": plan.plan_hash, "models": list(evaluation.models)},
        labels={**job_labels(plan), **evaluation.labels},
        seconds_on=seconds,
        lack_of=lambda it: shortage(plan, it) or sitting.shortage(it),
        commands=commands,
        needs=evaluation.needs,
    )


def _finish_here(plan: Plan, show: Show) -> int:
    """Do what a run that was killed at its very end had no time for; nothing is merged."""
    from ..run.engine import run_merge

    events = run_merge(plan)
    (console.print_json if show.as_json else console.follow)(events)
    return 0
