"""An evaluation from beginning to end, resumable."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

from ..documents import load_json
from ..errors import RecipeError, StoppedError
from ..sinks.durable import write_durably
from ..sources import Checkpoint
from ..sources.adapter import Adapter
from .asking import Answer, ask, loaded_on, open_model
from .engines import Answerer, Loading, choose_engine, loaded
from .results import evaluation, evaluation_files
from .tasks import Harness, Questions, Task, check_harness, find_tasks


class Examination:
    """The questions that models are asked, and a folder that keeps their answers.

    Args:
        tasks: as `find_task` takes them.
        out: the folder for ``evaluation.json``, ``.md`` and ``.png``, and for the answers so far,
            so that a run that ended early goes on: ``answers/MODEL/TASK-….jsonl``, a line for
            each question with what was wanted, what the model said, and whether that is right.
        limit: questions a task.
        device: as ``--device``.
        engine: what loads the models; as `choose_engine` takes it.
        token: to read models on the Hub with; None stands for HF_TOKEN or the login.
        cache: a folder for what is downloaded; None: where the Hub's client keeps it.
        say: told what is asked.

    Attributes:
        datasets: by task the id of the dataset on the Hub that its questions are from.

    Raises:
        RecipeError: a task does not exist, or is malformed; there is no such engine.
    """

    def __init__(
        self,
        tasks: Sequence[str],
        *,
        out: str | Path,
        limit: int = 500,
        device: str = "auto",
        engine: str = "auto",
        token: str | bool | None = None,
        cache: Path | None = None,
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        self._tasks = find_tasks(tasks, limit)
        check_harness(self._tasks)
        self._folder = Path(os.path.expanduser(out))
        self._limit, self._device, self._say = limit, device, say
        self._engine, self._token, self._cache = choose_engine(engine, device), token, cache
        self.datasets: dict[str, str] = {}

    def open(self, model: str, base: Checkpoint | None = None) -> Checkpoint:
        """Open the headers of a model, or of an adapter on a base.

        Raises:
            CheckpointError: it is no model, or broken; an adapter without a base that it fits.
            NotEnoughMemoryError: it does not fit.
        """
        return open_model(model, self._device, base, token=self._token)

    def verdicts(
        self, name: str, opened: Mapping[str, Checkpoint], places: Mapping[str, str]
    ) -> dict[str, list[bool]]:
        """Return by task whether each answer of a model is right, each task asked once.

        Args:
            name: of the model.
            opened: every model by name, from `open`; an adapter is put on the first.
            places: by name a folder, or namespace/name[@revision].

        Raises:
            CheckpointError: the model cannot be loaded.
            RecipeError: a task's check failed.
            StoppedError: the answers cannot be written.
        """
        identity: Any = opened[name].identity
        model_of = partial(self.loaded, places[name])
        if isinstance(opened[name], Adapter):
            base = next(iter(opened))
            identity = [identity, opened[base].identity]
            model_of = partial(self.loaded, places[base], adapter=places[name])
        return self._asked(name, identity, self._tasks, model_of)

    def _asked(
        self,
        name: str,
        identity: Any,
        tasks: Sequence[Task],
        model_of: Callable[[], AbstractContextManager[Answerer]],
    ) -> dict[str, list[bool]]:
        """Return a model's verdicts; it is loaded only where an answer is missing."""
        missing = [task for task in tasks if _kept(self._store(name, identity, task)) is None]
        if missing:
            with model_of() as model:
                for task, answers in ask(model, name, missing, self._limit, self._say):
                    store, lines = self._store(name, identity, task), []
                    for one in answers:
                        row = {k: v for k, v in one._asdict().items() if v != "" or k == "answer"}
                        lines.append(json.dumps(row, ensure_ascii=False))
                    with _written_to(self._folder):
                        store.parent.mkdir(parents=True, exist_ok=True)
                        write_durably(store, ("\n".join(lines) + "\n").encode())
        found = {}
        for task in tasks:
            answers = _kept(self._store(name, identity, task)) or []
            if answers and answers[0].dataset:
                self.datasets[task.name] = answers[0].dataset
            found[task.name] = [one.right for one in answers]
        return found

    def check_halves(self) -> None:
        """Refuse tasks that cannot be halved.

        Raises:
            RecipeError: a task asks one question.
        """
        self._half(0)

    def half_known(self, name: str, identity: Any, half: int) -> bool:
        """Return whether an earlier run asked a model one half (0 or 1) of the questions."""
        return all(_kept(self._store(name, identity, t)) is not None for t in self._half(half))

    def half_verdicts(
        self,
        name: str,
        identity: Any,
        half: int,
        model_of: Callable[[], AbstractContextManager[Answerer]],
    ) -> dict[str, list[bool]]:
        """Return a model's verdicts on every other question of each task, as `halved` cuts them.

        The harness asks all questions of its tasks, whatever is wanted of them.

        Args:
            name, identity: as for `verdicts`.
            half: 0 or 1: from which question on.
            model_of: loads the model where an answer is missing.

        Raises:
            CheckpointError: the model cannot be loaded.
            RecipeError: a task's check failed.
            StoppedError: the answers cannot be written.
        """
        found = self._asked(name, identity, self._half(half), model_of)
        whole = {task.name for task in self._tasks if isinstance(task, Harness)}
        return {task: bits[half::2] if task in whole else bits for task, bits in found.items()}

    def loaded(self, model: str, *, adapter: str = "") -> AbstractContextManager[Answerer]:
        """Load a model as it is loaded to be asked, and perhaps an adapter on it."""
        how = Loading(self._device, self._engine, self._token, self._cache)
        harness = any(isinstance(task, Harness) for task in self._tasks)
        if adapter:
            return loaded_on(adapter, model, how, harness=harness)
        return loaded(model, how, harness=harness)

    def _half(self, half: int) -> list[Task]:
        return [t.half(half) if isinstance(t, Questions) else t for t in self._tasks]

    def write(self, document: Mapping[str, Any]) -> None:
        """Write table, picture and JSON of an evaluation.

        Args:
            document: from `evaluation`.

        Raises:
            StoppedError: they cannot be written.
        """
        with _written_to(self._folder):
            self._folder.mkdir(parents=True, exist_ok=True)
            for file, data in evaluation_files(document).items():
                write_durably(self._folder / file, data)

    def _store(self, name: str, identity: Any, task: Task) -> Path:
        asked: Any = [task.name, self._limit]
        if isinstance(task, Questions):
            asked += [task.prompts, [dict(rule) for rule in task.rules], task.new_tokens]
        elif task.folder is not None:
            asked += [sorted(p.read_text("utf-8") for p in task.folder.glob("*.y*ml"))]
        # Two engines may answer a question differently: their answers are never mixed.
        asked += ["vllm"] if self._engine == "vllm" else []
        known = json.dumps([name, identity, asked], default=str)
        digest = hashlib.sha256(known.encode()).hexdigest()[:12]
        short = re.sub(r"[^\w.-]+", "-", name)[-60:].strip("-.")
        return self._folder / "answers" / (short or "model") / f"{task.name}-{digest}.jsonl"


def halved(verdicts: Mapping[str, Sequence[bool]], half: int) -> dict[str, Sequence[bool]]:
    """Return a model's verdicts on every other question of each task, from the first or second."""
    return {task: bits[half::2] for task, bits in verdicts.items()}


def woven(
    first: Mapping[str, Sequence[bool]], second: Mapping[str, Sequence[bool]]
) -> dict[str, list[bool]]:
    """Return the verdicts of which these are the halves, as `halved` cuts them."""
    found = {}
    for task, bits in first.items():
        found[task] = [False] * (len(bits) + len(second[task]))
        found[task][0::2], found[task][1::2] = bits, second[task]
    return found


def evaluate_models(
    models: Sequence[str] | Mapping[str, str | Path], examination: Examination
) -> dict[str, Any]:
    """Ask models the same questions, write what they answered, and return it.

    Args:
        models: folders, or namespace/name[@revision], perhaps by what they are called; the first
            is what the others are held against, and what adapters among them are put on.
        examination: the questions.

    Raises:
        RecipeError: there is no model, or a task's check failed.
        CheckpointError: a model is none, or broken.
        NotEnoughMemoryError: a model does not fit.
        StoppedError: the results cannot be written.
    """
    named = models if isinstance(models, Mapping) else {name: name for name in models}
    places = {name: str(place) for name, place in named.items()}
    names = list(places)
    if not names:
        raise RecipeError("an evaluation needs at least one model.")
    # All of them before the first is asked: a typo in the last name must not cost hours.
    with contextlib.ExitStack() as stack:
        opened: dict[str, Checkpoint] = {}
        for name in names:
            checkpoint = examination.open(places[name], opened.get(names[0]))
            opened[name] = stack.enter_context(contextlib.closing(checkpoint))
        verdicts = {name: examination.verdicts(name, opened, places) for name in names}
    document = evaluation(verdicts)
    examination.write(document)
    return document


def _kept(store: Path) -> list[Answer] | None:
    """Return the answers that an earlier run kept; None where they are damaged, or not there."""
    try:
        return [Answer(**load_json(line)) for line in store.read_bytes().splitlines()]
    except (FileNotFoundError, ValueError, TypeError):
        return None


@contextlib.contextmanager
def _written_to(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as exc:
        raise StoppedError(
            f"the evaluation cannot be written to {folder}: {exc.strerror}."
        ) from exc
