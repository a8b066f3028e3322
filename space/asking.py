"""A published merge and its models asked as a Job on the Hub, which the visitor pays for."""

import re
from collections.abc import Mapping
from typing import Any

from resmerge_stream.errors import PublishError, RecipeError, Remedy, shown
from resmerge_stream.specs import DTYPES, TensorSpec

from .asked import models_on_hub
from .identity import Visitor

# Of the harness, or built in: no path of this machine, and no list that never ends.
_TASK = re.compile(r"[A-Za-z0-9][A-Za-z0-9_+-]{0,79}")
_MOST_TASKS, _MOST_QUESTIONS = 10, 10_000


def models_asked(report: Mapping[str, Any]) -> list[str]:
    """Return base and experts of a merge, where the merge is a whole model and all are on the Hub.

    Args:
        report: of the merge; anybody's.
    """
    recipe = report.get("recipe")
    if not isinstance(recipe, dict) or report.get("adapter"):
        return []
    return models_on_hub(recipe)


def ask_as_job(
    report: Mapping[str, Any],
    repo_id: str,
    visitor: Visitor,
    *,
    tasks: str,
    limit: int,
    pay_up_to: float,
) -> dict[str, Any]:
    """Offer a Job that asks a merge what its models are asked, or start it.

    Args:
        report: of the merge.
        repo_id: where the merge is.
        visitor: who pays.
        tasks: names with commas between.
        limit: questions a task.
        pay_up_to: dollars; below what it may cost it is offered and not started.

    Returns:
        ``summary``, ``flavor``, ``usd_estimate``, ``usd_at_most``, ``seconds_estimate``,
        ``timeout_seconds``, and ``url`` of the Job, empty as long as there is none.

    Raises:
        PublishError: nobody is signed in.
        RecipeError: a task is none, the merge has models elsewhere, or no machine fits.
        JobRefusedError: the account may start no Jobs.
        StoppedError: the Hub kept failing.
    """
    from resmerge_stream.evaluation.proposal import merge_at
    from resmerge_stream.hub.jobs import HubJobs
    from resmerge_stream.jobs.evaluation import evaluation_job

    if not visitor.token:
        raise PublishError("an account has to pay for a Job.", Remedy.SIGN_IN)
    names, models = _names(tasks, limit), models_asked(report)
    if not models:
        raise RecipeError(
            "a Job asks models on the Hub. This merge is an adapter, or a model is a "
            "folder: ask them where they are."
        )
    all_models = [*models, repo_id]
    known = dict.fromkeys(all_models, _specs(report))
    merge_at(repo_id, visitor.token)
    job = evaluation_job(
        all_models, repo_id, names, limit=limit, known=known, check_harness_tasks=False
    )
    hub = HubJobs(visitor.token, visitor.name)
    job = job.on(hub.flavors())
    offer, running = job.offer(), hub.find(job.labels)
    if running is None and pay_up_to >= offer["usd_at_most"]:
        running = job.start(hub)
    return {"summary": job.summary, **offer, "url": hub.page(running) if running else ""}


def _names(tasks: str, limit: int) -> list[str]:
    names = list(dict.fromkeys(name.strip() for name in tasks.split(",") if name.strip()))
    wrong = [name for name in names if not _TASK.fullmatch(name)]
    if wrong:
        raise RecipeError(
            f"{shown(wrong[0])} names no task. Name tasks of lm-evaluation-harness, such as gsm8k; "
            "files of questions are asked from the command line."
        )
    if not 1 <= len(names) <= _MOST_TASKS:
        raise RecipeError(f"name 1 to {_MOST_TASKS} tasks, such as gsm8k, with commas between.")
    if not 1 <= limit <= _MOST_QUESTIONS:
        raise RecipeError(f"questions a task: 1 to {_MOST_QUESTIONS:,}, not {limit:,}.")
    return names


def _specs(report: Mapping[str, Any]) -> list[TensorSpec]:
    """Return the merge's tensors, which its models have as well."""
    try:
        specs = [
            TensorSpec(str(row["name"]), str(row["dtype"]), tuple(map(int, row["shape"])))
            for row in report["tensors"]
        ]
    except (KeyError, TypeError, ValueError) as exc:
        raise RecipeError("the report does not say which tensors the merge has.") from exc
    if not specs or any(spec.dtype not in DTYPES for spec in specs):
        raise RecipeError("the report does not say which tensors the merge has.")
    return specs
