"""An evaluation from beginning to end, resumable."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..errors import RecipeError, StoppedError
from ..sources import Checkpoint
from .asking import ask, open_model
from .results import evaluation, evaluation_files
from .tasks import Questions, Task, check_harness, find_task


def evaluate_models(
    models: Sequence[str],
    tasks: Sequence[str],
    *,
    out: str | Path,
    limit: int = 500,
    device: str = "auto",
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Ask models the same questions, and write what they answered.

    Args:
        models: folders, or namespace/name[@revision]; the first is what the others are held
            against.
        tasks: as `find_task` takes them.
        out: the folder for ``evaluation.json``, ``.md`` and ``.png``, and for the answers so far,
            so that a run that ended early goes on.
        limit: questions a task.
        device: as ``--device``.
        say: told what is asked.

    Raises:
        RecipeError: a task does not exist, or is malformed.
        CheckpointError: a model is none, or broken.
        NotEnoughMemoryError: a model does not fit.
        StoppedError: the results cannot be written.
    """
    names = list(dict.fromkeys(models))
    if not names or not tasks:
        raise RecipeError("an evaluation needs at least one model and one task.")
    found = [find_task(task, limit) for task in dict.fromkeys(tasks)]
    if len({task.name for task in found}) < len(found):
        raise RecipeError("two of the tasks have the same name.")
    check_harness(found)
    opened = {name: open_model(name, device) for name in names}
    folder = Path(os.path.expanduser(out))
    verdicts: dict[str, dict[str, list[bool]]] = {}
    try:
        (folder / "answers").mkdir(parents=True, exist_ok=True)
        for name, checkpoint in opened.items():
            verdicts[name] = _answers(name, checkpoint, found, folder, device, limit, say)
            checkpoint.close()
        for file, data in evaluation_files(verdicts).items():
            (folder / file).write_bytes(data)
    except OSError as exc:
        raise StoppedError(
            f"the evaluation cannot be written to {folder}: {exc.strerror}."
        ) from exc
    return evaluation(verdicts)


def _answers(
    name: str,
    checkpoint: Checkpoint,
    tasks: Sequence[Task],
    folder: Path,
    device: str,
    limit: int,
    say: Callable[[str], None],
) -> dict[str, list[bool]]:
    """Return a model's verdicts, each task asked once; kept by what was asked of which files."""
    found: dict[str, list[bool]] = {}
    for task in tasks:
        store = folder / "answers" / f"{_key(name, checkpoint, task, limit)}.json"
        if store.is_file():
            found[task.name] = json.loads(store.read_text(encoding="utf-8"))
            continue
        found |= ask(name, [task], device, limit, say)
        staged = store.with_suffix(".partial")
        staged.write_text(json.dumps(found[task.name]), encoding="utf-8")
        os.replace(staged, store)
    return found


def _key(name: str, checkpoint: Checkpoint, task: Task, limit: int) -> str:
    asked: Any = [task.name, limit]
    if isinstance(task, Questions):
        asked += [task.prompts, [dict(rule) for rule in task.rules], task.new_tokens]
    elif task.folder is not None:
        asked += [sorted(p.read_text("utf-8") for p in task.folder.glob("*.y*ml"))]
    known = [name, checkpoint.identity, asked]
    return hashlib.sha256(json.dumps(known, default=str).encode()).hexdigest()[:32]
