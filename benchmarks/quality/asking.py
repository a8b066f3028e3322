"""Every model's answers to the same held-out prompts, kept on disk by the weights' hash."""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from benchmarks.experts.asked import right
from benchmarks.experts.groups import FAMILIES, GROUPS
from benchmarks.experts.questions import Family
from resmerge_stream.experts.evaluate import load_model, load_tokenizer

from .text import PlainText

# By task, "1" for each prompt that was answered rightly and "0" for each other one.
Answers = dict[str, str]


class Asker:
    """Asks models the same prompts, each model once.

    Args:
        store: folder of the answers so far.
        n_prompts: held-out prompts per task.
        seed: of the prompts; not that of any prompts seen while the experts were made.
        family: the tasks.
        base: of a real language model's group: what it makes of plain text, merges are asked too.
    """

    def __init__(
        self,
        store: Path,
        *,
        n_prompts: int,
        seed: int,
        family: Family = FAMILIES["characters"],
        base: Path | None = None,
    ) -> None:
        self._store = store / f"{n_prompts}-{seed}"
        self._store.mkdir(parents=True, exist_ok=True)
        self._questions = {
            task: family.held_out(task, n_prompts, seed=seed) for task in family.tasks
        }
        self._model: Any = None
        self._tokenizer: Any = None
        self._base = base
        self._text: PlainText | None = None

    def ask(self, folder: Path, tasks: Sequence[str] | None = None) -> Answers:
        """Return a checkpoint's answers to some tasks, all unless told otherwise."""
        tasks = tasks or tuple(self._questions)
        path = self._store / f"{_weights_hash(folder)}.json"
        known: Answers = json.loads(path.read_text("utf-8")) if path.is_file() else {}
        missing = [task for task in tasks if task not in known]
        if missing:
            self._load(folder)
            for task in missing:
                verdicts = right(self._model, self._tokenizer, self._questions[task])
                known[task] = "".join("01"[verdict] for verdict in verdicts)
            path.write_text(json.dumps(known), encoding="utf-8")
        return {task: known[task] for task in tasks}

    @property
    def has_text(self) -> bool:
        """Whether checkpoints are also asked to read plain text."""
        return self._base is not None

    def read(self, folder: Path) -> dict[str, float]:
        """Return what a checkpoint makes of plain text, as `PlainText.measure` does.

        Raises:
            ValueError: the group has no real language model.
            MissingTextError: the text's package is not installed.
        """
        if self._base is None:
            raise ValueError("only a real language model is asked to read plain text.")
        path = self._store / f"{_weights_hash(folder)}.text.json"
        if not path.is_file():
            if self._text is None:
                self._text = PlainText(load_model(self._base), load_tokenizer(self._base))
            self._load(folder)
            path.write_text(json.dumps(self._text.measure(self._model)), encoding="utf-8")
        found: dict[str, float] = json.loads(path.read_text("utf-8"))
        return found

    def _load(self, folder: Path) -> None:
        """Put a checkpoint's weights into the loaded model where it is of their shapes."""
        weights = {
            name: tensor
            for path in folder.glob("*.safetensors")
            for name, tensor in load_file(path).items()
        }
        loaded = self._model.state_dict() if self._model is not None else {}
        if any(name not in loaded or loaded[name].shape != t.shape for name, t in weights.items()):
            self._model, self._tokenizer = load_model(folder), load_tokenizer(folder)
            return
        with torch.no_grad():
            for name, tensor in weights.items():
                loaded[name].copy_(tensor)


def study_parser(
    name: str, text: str, *, group: str, prompts: int, seed: int
) -> argparse.ArgumentParser:
    """Return the options of a study that asks the models of one group.

    Args:
        name: how `python -m benchmarks.quality` calls it.
        text: what it does, for ``--help``.
        group: whose models, unless told otherwise.
        prompts: held-out prompts a task, likewise.
        seed: of the prompts, likewise.
    """
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.quality {name}", description=text)
    parser.add_argument("--work", type=Path, default=Path("build/quality"), help="models, answers")
    parser.add_argument("--group", choices=GROUPS, default=group, help="whose RL experts")
    parser.add_argument("--prompts", type=int, default=prompts, help="held-out prompts a task")
    parser.add_argument("--seed", type=int, default=seed, help="of the prompts")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    return parser


def asker_of(arguments: argparse.Namespace) -> Asker:
    """Return who asks, by the options of `study_parser`."""
    return Asker(
        arguments.work / "answers",
        n_prompts=arguments.prompts,
        seed=arguments.seed,
        family=GROUPS[arguments.group].family,
    )


def _weights_hash(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:32]
