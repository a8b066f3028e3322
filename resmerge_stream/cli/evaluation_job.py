"""An evaluation as a Job: whom it asks what, the files it is given, and what it takes."""

import argparse
import importlib.util
import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from ..errors import RecipeError
from ..evaluation.machines import Sitting
from ..evaluation.tasks import Harness, check_harness, find_tasks
from ..planning.plan import Plan
from ..recipe import ModelRef
from ..sources import open_checkpoint
from ..specs import TensorSpec
from ..units import format_size
from .job import Errand, Show, follow, run_errand
from .submission import JobFiles, digest, labels_of, refuse_folders
from .wheel import requirements

# What makes a task of the harness need more than its own file.
_ELSEWHERE = re.compile(r"^\s*(include|data_files|data_dir)\s*:|!function", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class JobEvaluation:
    """What models are asked in a Job, and what that takes.

    Attributes:
        models: namespace/name[@revision], the one to hold the others against first.
        card: the merge among them that gets the pull request.
        tasks: as the user named them.
        limit: questions a task.
        device: as ``--device``.
        needs: what the harness needs installed, where it is asked for.
        sitting: what it takes of a machine.
    """

    models: tuple[str, ...]
    card: str
    tasks: tuple[str, ...]
    limit: int
    device: str
    needs: tuple[str, ...]
    sitting: Sitting

    @classmethod
    def of(
        cls,
        args: argparse.Namespace,
        models: Sequence[str],
        card: str,
        plan: Plan | None = None,
        *,
        say: Callable[[str], None],
    ) -> Self:
        """Return the evaluation that a command asks for; reads the models' headers.

        Args:
            args: with ``tasks`` and ``limit``.
            models: to ask.
            card: the one among them that gets the pull request.
            plan: of the merge that makes it first; None: it is there.
            say: told what cannot be checked here.

        Raises:
            RecipeError: a task does not exist, or needs files of this machine.
            CheckpointError: a model does not exist, or is broken.
        """
        names = [name.strip() for name in args.tasks.split(",") if name.strip()]
        tasks = find_tasks(names, args.limit)
        for name in names:
            _refuse_elsewhere(name)
        harness = [task for task in tasks if isinstance(task, Harness)]
        if harness and importlib.util.find_spec("lm_eval") is not None:
            check_harness(tasks)
        elif harness:
            say("warning: lm-evaluation-harness is not installed here: its tasks are not checked.")
        merged = [[tensor.spec for tensor in plan.tensors.values()]] if plan is not None else []
        stored = [_specs_of(name) for name in models if plan is None or name != card]
        device = "auto" if plan is not None else args.device
        taken = plan.unsent_bytes if plan is not None else 0
        return cls(
            tuple(models),
            card,
            tuple(names),
            args.limit,
            device,
            tuple(requirements("eval")) if harness else (),
            Sitting.of([*stored, *merged], tasks, args.limit, device, taken),
        )

    @property
    def summary(self) -> str:
        """A line that says how much it is."""
        return (
            f"evaluation: {len(self.models)} models are asked {', '.join(self.tasks)}; "
            f"{format_size(self.sitting.stored_bytes)} to read, "
            f"the largest takes {format_size(self.sitting.gpu_bytes)} on a GPU"
        )

    @property
    def labels(self) -> dict[str, str]:
        """What tells it from other evaluations: the models and what they are asked."""
        return {"resmerge-evaluation": digest(json.dumps(self.words(JobFiles())).encode())}

    def words(self, files: JobFiles) -> list[str]:
        """Return its command, and put the tasks' files among a Job's."""
        tasks = []
        for name in self.tasks:
            path = Path(name).expanduser()
            is_file = path.suffix in (".jsonl", ".yaml", ".yml")
            tasks.append(files.put("tasks", path.name, path.read_bytes()) if is_file else name)
        asked = ["--tasks", ",".join(tasks), "--limit", str(self.limit)]
        where = [] if self.device == "auto" else ["--device", self.device]
        return ["evaluate", *self.models, *asked, *where, "--card", self.card]


def evaluate_as_job(args: argparse.Namespace) -> int:
    """Run ``evaluate --job`` and return its exit code.

    Raises:
        ResMergeError: it was refused, or could not be followed.
    """
    if not args.card:
        raise RecipeError(
            "a Job's results are a pull request on the merge: say with --card which of the models."
        )
    refuse_folders(args.models)
    from ..evaluation.proposal import merge_at
    from ..hub.jobs import HubJobs

    show = Show(as_json=args.json)
    models = list(dict.fromkeys(args.models))
    evaluation = JobEvaluation.of(args, models, args.card, say=show.say)
    merge_at(args.card)
    jobs = HubJobs()
    labels = {**labels_of("evaluate", args.card), **evaluation.labels}
    if running := jobs.find(labels):
        show.say(f"this evaluation already runs as {jobs.page(running)}; following it.")
        return follow(jobs, running, show)
    errand = Errand(
        what="evaluation",
        summary=evaluation.summary,
        told={"models": models},
        labels=labels,
        seconds_on=evaluation.sitting.seconds,
        lack_of=evaluation.sitting.shortage,
        commands=lambda files: [evaluation.words(files)],
        needs=evaluation.needs,
    )
    return run_errand(jobs, errand, args, show)


def _specs_of(name: str) -> Iterable[TensorSpec]:
    checkpoint = open_checkpoint(ModelRef.parse(name))
    try:
        return [tensor.spec for tensor in checkpoint.tensors.values()]
    finally:
        checkpoint.close()


def _refuse_elsewhere(task: str) -> None:
    path = Path(task).expanduser()
    if path.suffix in (".yaml", ".yml") and _ELSEWHERE.search(path.read_text(encoding="utf-8")):
        raise RecipeError(
            f"{path.name} refers to other files, and a Job is given this one only. Put its data "
            "into a dataset on the Hub, or its questions into a JSONL file."
        )
