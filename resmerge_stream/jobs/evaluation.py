"""An evaluation as a Job: whom it asks what, the files it is given, and what it takes."""

import importlib.util
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from types import MappingProxyType

from ..errors import RecipeError
from ..evaluation.machines import EvaluationCost
from ..evaluation.tasks import Harness, check_harness, find_tasks
from ..planning.plan import Plan
from ..recipe import ModelRef
from ..sources import open_checkpoint
from ..specs import TensorSpec
from ..units import format_size
from .job import HubJob, digest, labels_of, put
from .wheel import requirements

# What makes a task of the harness need more than its own file.
_ELSEWHERE = re.compile(r"^\s*(include|data_files|data_dir)\s*:|!function", re.MULTILINE)


def evaluation_job(
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
) -> HubJob:
    """Return the Job that asks models tasks; reads the models' headers.

    Args:
        models: namespace/name[@revision], the one to hold the others against first.
        card: the merge among them that gets the pull request.
        names: of the tasks, or their files.
        limit: questions a task.
        device: as ``--device``; after a merge in the same Job it is chosen there.
        engine: what loads the models, as ``--engine``.
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
    files, told = dict[str, bytes](), []  # as the Job is to be told the tasks
    for name in names:
        path = Path(name).expanduser()
        if path.suffix in (".yaml", ".yml") and _ELSEWHERE.search(path.read_text(encoding="utf-8")):
            raise RecipeError(
                f"{path.name} refers to other files, and a Job is given this one only. Put its "
                "data into a dataset on the Hub, or its questions into a JSONL file."
            )
        is_file = path.suffix in (".jsonl", ".yaml", ".yml")
        told.append(put(files, "tasks", path.name, path.read_bytes()) if is_file else name)
    harness = [task for task in tasks if isinstance(task, Harness)]
    if harness and check_harness_tasks and importlib.util.find_spec("lm_eval") is not None:
        check_harness(tasks)
    elif harness and check_harness_tasks:
        say("warning: lm-evaluation-harness is not installed here: its tasks are not checked.")
    specs: list[Iterable[TensorSpec]] = []
    for name in models:
        if plan is not None and name == card:
            continue
        if name in known:
            specs.append(known[name])
            continue
        with closing(open_checkpoint(ModelRef.parse(name))) as checkpoint:
            specs.append([tensor.spec for tensor in checkpoint.tensors.values()])
    if plan is not None:
        specs.append([tensor.spec for tensor in plan.tensors.values()])
    device = "auto" if plan is not None else device
    taken = plan.unsent_bytes if plan is not None else 0
    cost = EvaluationCost.of(specs, tasks, limit, device, taken)
    on_cpu = device == "cpu"
    needed = format_size(4 * cost.numel if on_cpu else cost.gpu_bytes)
    words = [
        *("evaluate", *models),
        *("--tasks", ",".join(told)),
        *("--limit", str(limit)),
        *(() if device == "auto" else ("--device", device)),
        *(() if engine == "auto" else ("--engine", engine)),
        *("--card", card),
    ]
    return HubJob(
        what="evaluation",
        summary=f"evaluation: {len(models)} models are asked {', '.join(names)}; "
        f"{format_size(cost.stored_bytes)} to read, "
        f"the largest takes {needed} {'of memory' if on_cpu else 'on a GPU'}",
        told={"models": list(models)},
        labels={
            **labels_of("evaluate", card),
            # What tells it from other evaluations: the models and what they are asked.
            "resmerge-evaluation": digest(json.dumps(words).encode()),
        },
        commands=[words],
        files=files,
        seconds_on=cost.seconds,
        lack_of=cost.shortage,
        needs=(
            *(requirements("eval") if harness else ()),
            *(["vllm"] if engine == "vllm" else ()),
        ),
    )
