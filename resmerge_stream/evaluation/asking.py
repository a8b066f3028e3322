"""A model asked tasks: what it answers to each question, and whether that is right."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from typing import Any, NamedTuple

from ..device import available_memory, choose_device
from ..errors import (
    CheckpointFormatError,
    NotEnoughMemoryError,
    Remedy,
    UnsupportedCheckpointError,
    shown,
)
from ..hub.patience import MERGING_S, PATIENCE
from ..planning.plan import Options, plan_merge
from ..recipe import ModelRef, Recipe
from ..run.merging import Merger
from ..run.processes import Processes
from ..run.progress import Progress
from ..run.shards import Branch, Run, merge_shards
from ..sinks.tensors import TensorSink
from ..sources import REPO_ID, Checkpoint, open_checkpoint
from ..sources.adapter import Adapter, is_bare_adapter
from ..units import format_size
from .engines import Answerer, Loading, in_memory, loaded
from .tasks import Harness, Task


class Answer(NamedTuple):
    """What a model said to a question.

    Attributes:
        question: the prompt.
        wanted: what is right: a text, or the pattern, number or function that decides.
        answer: what the model said.
        right: whether that is right.
        dataset: the id on the Hub of the questions, where the harness has them from there.
    """

    question: str
    wanted: str
    answer: str
    right: bool
    dataset: str = ""


def open_model(
    text: str, device: str, base: Checkpoint | None = None, *, token: str | bool | None = None
) -> Checkpoint:
    """Open a model's headers, and refuse it where its weights do not fit into memory.

    Args:
        text: a folder, or namespace/name[@revision]; of a model, or of an adapter.
        device: as ``--device``.
        base: what an adapter is put on.
        token: as for `open_checkpoint`.

    Raises:
        CheckpointError: it is no model, a broken one, or in a bucket; an adapter that has no base
            or fits none.
        NotEnoughMemoryError: its weights need more memory than is free.
    """
    ref = ModelRef.parse(text)
    if ref.in_bucket is not None:
        raise UnsupportedCheckpointError(
            f"{shown(text)} is in a bucket of the Hub, which transformers does not load models "
            f"from. Copy it with 'hf buckets sync {ref.id} FOLDER', and give the folder."
        )
    checkpoint = open_checkpoint(ref, token=token)
    if is_bare_adapter(checkpoint):
        if base is None or isinstance(base, Adapter):
            raise UnsupportedCheckpointError(
                f"{shown(text)} is an adapter, which answers on its base only. Name the base first."
            )
        checkpoint = Adapter.of(checkpoint, base)
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


@contextmanager
def loaded_on(text: str, base: str, how: Loading, *, harness: bool) -> Iterator[Answerer]:
    """Load a base, and add an adapter's updates to its weights.

    Args:
        text: the adapter: a folder, or namespace/name[@revision].
        base: likewise.
        how: the base is loaded.
        harness: whether a task of the harness will be asked.

    Raises:
        ResMergeError: the base cannot be loaded, or the two cannot be merged.
    """
    with loaded(base, how, harness=harness) as model:
        refs = ModelRef.parse(base), (ModelRef.parse(text),)
        dtype = "float32" if choose_device(how.device).type == "cpu" else None
        plan = plan_merge(
            Recipe(*refs, "task_arithmetic", dtype=dtype),
            Options(device=how.device),
            token=how.token,
        ).accepted()
        with closing(plan):
            merger = Merger(plan, choose_device(how.device))
            branch = Branch(plan, TensorSink(model.overwrite), merger)
            with PATIENCE.of(MERGING_S):
                for _ in merge_shards(Run([branch], Progress(lambda: 0)), Processes()):
                    pass
        yield model


def ask(
    model: Answerer, text: str, tasks: Sequence[Task], limit: int, say: Callable[[str], None]
) -> Iterator[tuple[Task, list[Answer]]]:
    """Yield each task, and what a loaded model answers, decoded greedily.

    Args:
        model: from `loaded`.
        text: what it is called.
        tasks: from `find_task`.
        limit: questions a task of the harness.
        say: told each task before it is asked.

    Raises:
        CheckpointFormatError: the model does not run.
        NotEnoughMemoryError: a GPU is too small for it.
        RecipeError: a task's check failed.
    """
    for task in tasks:
        say(f"{text}: {task.name}")
        with in_memory(text):
            if isinstance(task, Harness):
                found = _ask_harness(model, task, limit)
            else:
                found = [
                    Answer(prompt, str(rule.get("answer", rule.get("function"))), *said)
                    for prompt, rule, said in zip(
                        task.prompts, task.rules, model.answers(task), strict=True
                    )
                ]
        yield task, found


def _ask_harness(model: Answerer, task: Harness, limit: int) -> list[Answer]:
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
    dataset = path if REPO_ID.fullmatch(path) and not os.path.exists(path) else ""
    return [
        Answer(
            str(sample["arguments"][0][0]),
            str(sample["target"]),
            str(sample["filtered_resps"][0]),
            _is_right(sample),
            dataset,
        )
        for sample in samples
    ]


def _is_right(sample: Mapping[str, Any]) -> bool:
    """Return the verdict of the first metric that is one of right or wrong."""
    for key in ("exact_match", "acc", *sample.get("metrics", ())):
        if key in sample:
            return float(sample[key]) >= 1
    raise CheckpointFormatError("the task has no metric that says right or wrong.")
