"""The command ``submit``: plan here, then merge as a Job, and evaluate there what was merged."""

import argparse

from ..errors import JobRefusedError, RecipeError
from ..jobs.fleet import running
from ..jobs.job import refuse_folders
from ..jobs.merge import merge_job
from ..planning.machines import largest
from ..planning.plan import Plan, plan_merge
from ..units import duration
from . import console
from .job import Show, attach, attempts_asked, follow, machines_asked, run_job
from .options import request_of
from .slurm import write_batch


def submit(args: argparse.Namespace) -> int:
    """Run the command and return its exit code.

    Raises:
        ResMergeError: it was refused, or could not be followed.
    """
    if args.slurm:
        return write_batch(args)
    show = Show(as_json=args.json)
    if args.attach:
        return attach(args.attach, show)
    if not args.push_to:
        raise RecipeError("a Job publishes its result: give --push-to NAMESPACE/NAME.")
    if args.timeout:
        duration(args.timeout)  # refused before the plan takes its time
    alone = machines_asked(args) == 1
    attempts_asked(args)
    if args.then and not alone:
        raise RecipeError(
            "--then evaluate asks one machine: leave out --machines, or give 'evaluate --job' when "
            "the merge is published."
        )
    if bool(args.tasks) != bool(args.then):
        raise RecipeError("--then evaluate and --tasks need each other: give both.")
    asked = request_of(args)
    refuse_folders(
        [*(ref.id for ref in asked.recipe.named), *filter(None, [asked.options.tokenizer_from])]
    )
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
    ).accepted()
    try:
        return _submit(args, plan, show)
    finally:
        plan.close()


def _submit(args: argparse.Namespace, plan: Plan, show: Show) -> int:
    from ..hub.jobs import HubJobs

    if plan.target is None:
        raise RuntimeError("a plan with a publication has a target")
    evaluation = None
    if args.then:
        from ..evaluation.contest import models_of
        from ..jobs.evaluation import evaluation_job

        models, merged = models_of(plan), args.push_to
        refuse_folders(models)
        names = [name.strip() for name in args.tasks.split(",") if name.strip()]
        how = {"limit": args.limit, "engine": args.engine}
        evaluation = evaluation_job(
            [*models, merged], merged, names, **how, plan=plan, say=show.say
        )
    if plan.target.finished and evaluation is None:
        # What a run that was killed at its very end had no time for; nothing is merged.
        from ..run.engine import run_merge

        events = run_merge(plan)
        (console.print_json if show.as_json else console.follow)(events)
        return 0
    hub = HubJobs(plan.token, str(plan.target.account["name"]))
    merge = merge_job(plan)
    job = merge.then(evaluation) if evaluation is not None else merge
    if found := running(hub, job.labels, show.say):
        show.say(f"this merge already runs as {hub.page(found)}; following it.")
        return follow(hub, found, show, job)
    if evaluation is not None and (found := hub.find(merge.labels)):
        raise JobRefusedError(
            f"this merge already runs as {hub.page(found)}, without this evaluation. Give the "
            f"same command when it has ended; submit --attach {hub.namespace}/{found} shows it."
        )
    for warning in plan.warnings:
        show.say(f"warning: {warning}")
    return run_job(hub, job, args, show)
