"""A model asked tasks: which questions it answers rightly."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from ..device import available_memory, choose_device
from ..errors import CheckpointFormatError, NotEnoughMemoryError, Remedy, shown
from ..recipe import ModelRef
from ..sources import REPO_ID, Checkpoint, open_checkpoint
from ..units import format_size
from .engines import Answerer, Loading, in_memory, loaded
from .tasks import Harness, Task


class Answers(NamedTuple):
    """Which questions of a task were answered rightly, and whose questions they are.

    Attributes:
        right: by question.
        dataset: their id on the Hub, where the harness has them from there.
    """

    right: list[bool]
    dataset: str | None = None


def open_model(text: str, device: str, *, token: str | bool | None = None) -> Checkpoint:
    """Open a model's headers, and refuse it where its weights do not fit into memory.

    Args:
        text: a folder, or namespace/name[@revision].
        device: as ``--device``.
        token: as for `open_checkpoint`.

    Raises:
        CheckpointError: it is no model, or a broken one.
        NotEnoughMemoryError: its weights need more memory than is free.
    """
    checkpoint = open_checkpoint(ModelRef.parse(text), token=token)
    if choose_device(device).type == "cpu":
        # Computed in float32 there: CPUs are slow and uneven in bf16.
        numel = sum(math.prod(t.spec.shape) for t in checkpoint.tensors.values())
        free = available_memory()
        if 4 * numel > free:
            raise NotEnoughMemoryError(
                f"{shown(text)} needs {format_size(4 * numel)} of memory to be asked on a CPU, "
                f"and {format_size(free)} are free. A machine with a GPU needs half of that.",
                Remedy.ASK_AS_JOB,
            )
    return checkpoint


def ask(
    text: str,
    tasks: Sequence[Task],
    how: Loading,
    limit: int,
    say: Callable[[str], None],
) -> Iterator[tuple[str, Answers]]:
    """Yield each task's name, and which of its questions a model answers rightly, decoded greedily.

    The model is loaded once, when the first is asked for.

    Args:
        text: a folder, or namespace/name[@revision].
        tasks: from `find_task`.
        how: it is loaded.
        limit: questions a task of the harness.
        say: told each task before it is asked.

    Raises:
        CheckpointFormatError: the model cannot be loaded.
        NotEnoughMemoryError: a GPU is too small for it.
        RecipeError: a task's check failed, or there is no such engine.
    """
    harness = any(isinstance(task, Harness) for task in tasks)
    with loaded(text, how, harness=harness) as model:
        for task in tasks:
            say(f"{text}: {task.name}")
            with in_memory(text):
                if isinstance(task, Harness):
                    found = _ask_harness(model, task, limit)
                else:
                    found = Answers(model.right(task))
            yield task.name, found


def _ask_harness(model: Answerer, task: Harness, limit: int) -> Answers:
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    found = simple_evaluate(
        model=model.for_harness(),
        tasks=[task.name],
        task_manager=TaskManager(include_path=str(task.folder) if task.folder else None),
        limit=limit,
        log_samples=True,
        bootstrap_iters=0,
    )
    # A task that takes answers in several ways lists each question once a way: the first counts.
    samples = [
        sample
        for _, listed in sorted(found["samples"].items())
        for sample in listed
        if sample["filter"] == listed[0]["filter"]
    ]
    samples.sort(key=lambda sample: sample["doc_id"])
    path = str(next(iter(found["configs"].values())).get("dataset_path", ""))
    dataset = path if REPO_ID.fullmatch(path) and not os.path.exists(path) else None
    return Answers([_is_right(sample) for sample in samples], dataset)


def _is_right(sample: Mapping[str, Any]) -> bool:
    """Return the verdict of the first metric that is one of right or wrong."""
    for key in ("exact_match", "acc", *sample.get("metrics", ())):
        if key in sample:
            return float(sample[key]) >= 1
    raise CheckpointFormatError("the task has no metric that says right or wrong.")
