"""A model asked tasks: which questions it answers rightly."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from ..device import available_memory, choose_device
from ..errors import CheckpointFormatError, NotEnoughMemoryError, Remedy, shown
from ..experts.evaluate import right_answers
from ..experts.tasks import TASKS
from ..recipe import ModelRef
from ..sources import REPO_ID, Checkpoint, open_checkpoint
from ..units import format_size
from .tasks import BATCH, Harness, Questions, Task
from .verifiers import verify


class Answers(NamedTuple):
    """Which questions of a task were answered rightly, and whose questions they are.

    Attributes:
        right: by question.
        dataset: their id on the Hub, where the harness has them from there.
    """

    right: list[bool]
    dataset: str | None = None


def open_model(text: str, device: str) -> Checkpoint:
    """Open a model's headers, and refuse it where its weights do not fit into memory.

    Args:
        text: a folder, or namespace/name[@revision].
        device: as ``--device``.

    Raises:
        CheckpointError: it is no model, or a broken one.
        NotEnoughMemoryError: its weights need more memory than is free.
    """
    checkpoint = open_checkpoint(ModelRef.parse(text))
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
    text: str, tasks: Sequence[Task], device: str, limit: int, say: Callable[[str], None]
) -> Iterator[tuple[str, Answers]]:
    """Yield each task's name, and which of its questions a model answers rightly, decoded greedily.

    The model is loaded once, when the first is asked for.

    Args:
        text: a folder, or namespace/name[@revision].
        tasks: from `find_task`.
        device: as ``--device``.
        limit: questions a task of the harness.
        say: told each task before it is asked.

    Raises:
        CheckpointFormatError: transformers cannot load the model.
        NotEnoughMemoryError: a GPU is too small for it.
        RecipeError: a task's check failed.
    """
    with _in_memory(text):
        model, tokenizer = _load(text, device)
    for task in tasks:
        say(f"{text}: {task.name}")
        with _in_memory(text):
            if isinstance(task, Harness):
                found = _ask_harness(model, tokenizer, task, limit)
            elif task.name in TASKS and _knows(tokenizer, task.prompts[0]):
                found = Answers(right_answers(model, tokenizer, task.prompts))
            else:
                found = Answers(verify(task.rules, _answers(model, tokenizer, task)))
        yield task.name, found


@contextmanager
def _in_memory(text: str) -> Iterator[None]:
    import torch

    try:
        yield
    except torch.OutOfMemoryError as exc:
        raise NotEnoughMemoryError(
            f"{shown(text)} and its answers do not fit into the GPU's memory.",
            Remedy.ASK_ON_CPU,
        ) from exc


def _load(text: str, device: str) -> tuple[Any, Any]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging as transformers_logging

    where = choose_device(device)
    dtype = torch.float32 if where.type == "cpu" else "auto"
    ref = ModelRef.parse(text)
    logging: Any = transformers_logging
    logging.disable_progress_bar()
    try:
        made: Any = AutoModelForCausalLM.from_pretrained(
            ref.id,
            revision=ref.revision or "main",
            subfolder=ref.subfolder or "",
            dtype=dtype,
            output_loading_info=True,
        )
        model, info = made
        tokenizer: Any = AutoTokenizer.from_pretrained(
            ref.id, revision=ref.revision or "main", subfolder=ref.subfolder or ""
        )
    except Exception as exc:  # transformers raises whatever its parts raise
        reason = (str(exc).strip().splitlines() or [type(exc).__name__])[0]
        raise CheckpointFormatError(f"{shown(text)} cannot be loaded: {reason}") from exc
    if info["missing_keys"]:
        missing = ", ".join(sorted(info["missing_keys"])[:3])
        raise CheckpointFormatError(f"{shown(text)} lacks weights of its architecture: {missing}.")
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model.to(where).eval(), tokenizer


def _knows(tokenizer: Any, prompt: str) -> bool:
    """Return whether a tokenizer takes a prompt's answers apart as the built-in experts' does."""
    return len(tokenizer(prompt).input_ids) == len(prompt) and tokenizer.eos_token is not None


def _answers(model: Any, tokenizer: Any, task: Questions) -> list[str]:
    import torch

    texts: list[str] = []
    for start in range(0, len(task.prompts), BATCH):
        asked = list(task.prompts[start : start + BATCH])
        batch = tokenizer(asked, padding=True, return_tensors="pt").to(model.device)
        batch.pop("token_type_ids", None)
        with torch.no_grad():
            tokens = model.generate(
                **batch,
                max_new_tokens=task.new_tokens,
                do_sample=False,
                pad_token_id=tokenizer.pad_token_id,
            )
        new = tokens[:, batch["input_ids"].shape[1] :]
        texts += tokenizer.batch_decode(new, skip_special_tokens=True)
    return texts


def _ask_harness(model: Any, tokenizer: Any, task: Harness, limit: int) -> Answers:
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    found = simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=BATCH),
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
