"""An evaluation as a Job: whom it asks what, the files it is given, and what it takes."""

import importlib.util
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Self

from ..errors import RecipeError
from ..evaluation.machines import Sitting
from ..evaluation.tasks import Harness, check_harness, find_tasks
from ..planning.plan import Plan
from ..recipe import ModelRef
from ..sources import open_checkpoint
from ..specs import TensorSpec
from ..units import format_size
from .errand import Errand
from .submission import JobFiles, digest, labels_of
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
        engine: what loads the models, as ``--engine``.
        needs: what has to be installed beside the package: the harness, vLLM.
        sitting: what it takes of a machine.
    """

    models: tuple[str, ...]
    card: str
    tasks: tuple[str, ...]
    limit: int
    device: str
    engine: str
    needs: tuple[str, ...]
    sitting: Sitting

    @classmethod
    def of(
        cls,
        models: Sequence[str],
        card: str,
        names: Sequence[str],
        *,
        limit: int,
        device: str = "auto",
        engine: str = "auto",
        plan: Plan | None = None,
        known: Mapping[str, Iterable[TensorSpec]] = MappingProxyType({}),
        check_harness_tasks: bool = True,
        say: Callable[[str], None] = lambda text: None,
    ) -> Self:
        """Return the evaluation of models by tasks; reads the models' headers.

        Args:
            models: to ask.
            card: the one among them that gets the pull request.
            names: of the tasks, or their files.
            limit: questions a task.
            device: as ``--device``; after a merge in the same Job it is chosen there.
            engine: as ``--engine``.
            plan: of the merge that makes it first; None: it is there.
            known: the tensors of models whose headers need not be read.
            check_harness_tasks: whether tasks of the harness are looked up, where it is installed;
                that imports it.
            say: told what cannot be checked here.

        Raises:
            RecipeError: a task does not exist, or needs files of this machine.
            CheckpointError: a model does not exist, or is broken.
        """
        tasks = find_tasks(names, limit)
        for name in names:
            _refuse_elsewhere(name)
        harness = [task for task in tasks if isinstance(task, Harness)]
        if harness and check_harness_tasks and importlib.util.find_spec("lm_eval") is not None:
            check_harness(tasks)
        elif harness and check_harness_tasks:
            say("warning: lm-evaluation-harness is not installed here: its tasks are not checked.")
        merged = [[tensor.spec for tensor in plan.tensors.values()]] if plan is not None else []
        stored = [
            known[name] if name in known else _specs_of(name)
            for name in models
            if plan is None or name != card
        ]
        device = "auto" if plan is not None else device
        taken = plan.unsent_bytes if plan is not None else 0
        return cls(
            tuple(models),
            card,
            tuple(names),
            limit,
            device,
            engine,
            (*(requirements("eval") if harness else ()), *(["vllm"] if engine == "vllm" else ())),
            Sitting.of([*stored, *merged], tasks, limit, device, taken),
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
        engine = [] if self.engine == "auto" else ["--engine", self.engine]
        return ["evaluate", *self.models, *asked, *where, *engine, "--card", self.card]

    def errand(self) -> Errand:
        """Return it as what a Job is to do."""
        return Errand(
            what="evaluation",
            summary=self.summary,
            told={"models": list(self.models)},
            labels={**labels_of("evaluate", self.card), **self.labels},
            seconds_on=self.sitting.seconds,
            lack_of=self.sitting.shortage,
            commands=lambda files: [self.words(files)],
            needs=self.needs,
        )


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
