"""The questions: built-in tasks, JSONL files, and tasks of EleutherAI's lm-evaluation-harness."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..documents import load_json, load_yaml
from ..errors import RecipeError, shown
from ..experts.tasks import TASKS, answer, draw_prompts
from .verifiers import check_rule

# Of the held-out prompts of a built-in task.
_SEED = 7
# Tokens that an answer may have; questions that are asked at once.
NEW_TOKENS, BATCH = 256, 32
# Of a task of the harness, or of one line of questions.
_MAX_TASK_BYTES = 1_000_000


@dataclass(frozen=True, slots=True)
class Questions:
    """Prompts that we ask ourselves.

    Attributes:
        name: of the task.
        prompts: texts.
        rules: one a prompt, for `verifiers.verify`.
        new_tokens: that an answer may have.
    """

    name: str
    prompts: tuple[str, ...]
    rules: tuple[Mapping[str, Any], ...]
    new_tokens: int

    def half(self, half: int) -> Questions:
        """Return every other question, from the first (0) or the second (1).

        Raises:
            RecipeError: there is only one question.
        """
        if len(self.prompts) < 2:
            raise RecipeError(
                f"{self.name} asks one question. One half chooses and the other reports: give two "
                "or more."
            )
        return replace(self, prompts=self.prompts[half::2], rules=self.rules[half::2])


@dataclass(frozen=True, slots=True)
class Harness:
    """A task of the harness.

    Attributes:
        name: as the harness calls it.
        folder: where its YAML lies; None for the harness's own.
    """

    name: str
    folder: Path | None


Task = Questions | Harness


def find_task(text: str, limit: int) -> Task:
    """Return what a name or path stands for.

    Args:
        text: a built-in task, a ``.jsonl`` or ``.yaml`` file, or a task of the harness.
        limit: questions a task.

    Raises:
        RecipeError: there is no such task or file, or a line of it is wrong.
    """
    if text in TASKS:
        prompts = tuple(draw_prompts(text, limit, seed=_SEED, split="held-out"))
        rules = tuple({"answer": answer(prompt)} for prompt in prompts)
        return Questions(text, prompts, rules, max(len(str(r["answer"])) for r in rules) + 1)
    path = Path(text).expanduser()
    if path.suffix in (".jsonl", ".yaml", ".yml"):
        if not path.is_file():
            raise RecipeError(f"there is no file {shown(text)} with tasks.")
        if path.suffix == ".jsonl":
            return _read_questions(path, limit)
        try:
            # The harness has tags of its own, such as !function.
            document = load_yaml(path.read_bytes(), max_bytes=_MAX_TASK_BYTES, has_tags=True)
        except ValueError as exc:
            raise RecipeError(f"{path.name} is not YAML: {exc}") from exc
        name = document.get("task") if isinstance(document, dict) else None
        if not isinstance(name, str):
            raise RecipeError(f"{path.name}: a task of the harness names itself under 'task'.")
        return Harness(name, path.resolve().parent)
    return Harness(text, None)


def find_tasks(texts: Sequence[str], limit: int) -> list[Task]:
    """Return what names and paths stand for, each once; each as `find_task`.

    Raises:
        RecipeError: there is none, two have the same name, or one is wrong.
    """
    if limit < 1:
        raise RecipeError(f"a task needs at least one question, not {limit}.")
    if not texts:
        raise RecipeError("an evaluation needs at least one task.")
    tasks = [find_task(text, limit) for text in dict.fromkeys(texts)]
    if len({task.name for task in tasks}) < len(tasks):
        raise RecipeError("two of the tasks have the same name.")
    return tasks


def _read_questions(path: Path, limit: int) -> Questions:
    prompts, rules, new_tokens = [], [], 0
    with path.open("rb") as file:
        lines = iter(lambda: file.readline(_MAX_TASK_BYTES + 1), b"")
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            where = f"{path.name}, line {number}"
            try:
                rule = load_json(line, max_bytes=_MAX_TASK_BYTES)
            except ValueError as exc:
                raise RecipeError(f"{where} is not JSON: {exc}.") from exc
            if not isinstance(rule, dict) or not isinstance(rule.get("prompt"), str):
                raise RecipeError(f"{where}: expected an object with a prompt, a text.")
            check_rule(rule, where)
            prompts.append(rule["prompt"])
            rules.append(rule)
            tokens = rule.get("max_new_tokens", NEW_TOKENS)
            if not isinstance(tokens, int) or not 1 <= tokens <= 100_000:
                raise RecipeError(f"{where}: max_new_tokens must be 1 to 100,000.")
            new_tokens = max(new_tokens, tokens)
            if len(prompts) == limit:
                break
    if not prompts:
        raise RecipeError(f"{path.name} asks nothing. Write one JSON object a line, with a prompt.")
    return Questions(path.stem, tuple(prompts), tuple(rules), new_tokens)


def check_harness(tasks: Sequence[Task]) -> None:
    """Refuse tasks of the harness that it does not know.

    Raises:
        RecipeError: a task does not exist, or the harness is not installed.
    """
    wanted = [task for task in tasks if isinstance(task, Harness)]
    if not wanted:
        return
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as exc:
        names = ", ".join(task.name for task in wanted)
        raise RecipeError(
            f"{shown(names)}: none of the built-in tasks ({', '.join(TASKS)}) and no file. If it "
            "is a task of lm-evaluation-harness: pip install 'resmerge-stream[eval]'."
        ) from exc
    for task in wanted:
        manager = TaskManager(include_path=str(task.folder) if task.folder else None)
        if task.name not in manager.all_tasks:
            raise RecipeError(
                f"there is no task {shown(task.name)}: none of the built-in ones "
                f"({', '.join(TASKS)}), and lm-evaluation-harness has none of that name."
            )
