"""A merge as a Job: the same command with the same recipe, on one of the Hub's machines."""

from ..errors import RecipeError, Remedy
from ..planning.machines import fleet, merge_work, shortage
from ..planning.planned import Plan
from ..planning.request import Request
from ..sinks.publication import Publication
from ..units import format_size
from .job import HubJob, labels_of, put


def merge_job(plan: Plan) -> HubJob:
    """Return the Job that runs a plan.

    Raises:
        RecipeError: the plan has no repository to publish to.
    """
    files: dict[str, bytes] = {}
    finished = plan.target is not None and plan.target.finished
    return HubJob(
        what="merge",
        summary=f"plan {plan.plan_hash}: {len(plan.tensors)} tensors, "
        f"{format_size(plan.read_bytes)} to read, {format_size(plan.write_bytes)} to publish",
        told={"plan_hash": plan.plan_hash},
        labels={
            **labels_of("resmerge", _publication(plan.request).repo_id),
            "resmerge-plan": plan.plan_hash,
        },
        commands=[merge_words(plan.request, files)],
        files=files,
        seconds_on=lambda it, speed: 0.0 if finished else merge_work(plan, it).seconds(speed),
        lack_of=lambda it: shortage(plan, it),
        fleet_on=lambda it, speed, machines: fleet(plan, it, speed, machines),
        most_machines=len(plan.shards),
        work_on=lambda it: merge_work(plan, it),
    )


def merge_words(asked: Request, files: dict[str, bytes]) -> list[str]:
    """Return the command of the same merge, and put its recipe among the files.

    Raises:
        RecipeError: there is no repository to publish to.
    """
    recipe = put(files, "recipes", "recipe.yml", asked.recipe.to_yaml().encode())
    publish = _publication(asked).words()
    # A stop costs a Job its machine: it waits longer before it gives up.
    patience = [] if asked.options.patience is not None else ["--patience", "1h"]
    return ["merge", recipe, *publish, *asked.options.words(), *patience]


def _publication(asked: Request) -> Publication:
    if asked.publication is None:
        raise RecipeError("a Job publishes its result.", Remedy.GIVE_TARGET)
    return asked.publication
