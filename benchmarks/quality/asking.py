"""Every model's answers to the same held-out prompts, kept on disk by the weights' hash."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from resmerge_stream.experts.evaluate import load_model, load_tokenizer, right_answers
from resmerge_stream.experts.tasks import TASKS, draw_prompts

# By task, "1" for each prompt that was answered rightly and "0" for each other one.
Answers = dict[str, str]


class Asker:
    """Asks models the same prompts, each model once.

    Args:
        store: folder of the answers so far.
        n_prompts: held-out prompts per task.
        seed: of the prompts; not that of any prompts seen while the experts were made.
    """

    def __init__(self, store: Path, *, n_prompts: int, seed: int) -> None:
        self._store = store / f"{n_prompts}-{seed}"
        self._store.mkdir(parents=True, exist_ok=True)
        self._prompts = {
            task: draw_prompts(task, n_prompts, seed=seed, split="held-out") for task in TASKS
        }

    def ask(self, folder: Path, tasks: Sequence[str] = TASKS) -> Answers:
        """Return a checkpoint's answers to some tasks."""
        path = self._store / f"{_weights_hash(folder)}.json"
        known: Answers = json.loads(path.read_text("utf-8")) if path.is_file() else {}
        missing = [task for task in tasks if task not in known]
        if missing:
            model, tokenizer = load_model(folder), load_tokenizer(folder)
            for task in missing:
                right = right_answers(model, tokenizer, self._prompts[task])
                known[task] = "".join("01"[verdict] for verdict in right)
            path.write_text(json.dumps(known), encoding="utf-8")
        return {task: known[task] for task in tasks}


def _weights_hash(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:32]
