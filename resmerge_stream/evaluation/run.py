"""An evaluation from beginning to end, resumable."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import RecipeError, StoppedError
from ..sinks.durable import write_durably
from ..sources import Checkpoint
from .asking import ask, open_model
from .engines import Loading, choose_engine
from .results import Verdicts, evaluation, evaluation_files
from .tasks import Questions, Task, check_harness, find_tasks


class Examination:
    """The questions that models are asked, and a folder that keeps their answers.

    Args:
        tasks: as `find_task` takes them.
        out: the folder for ``evaluation.json``, ``.md`` and ``.png``, and for the answers so far,
            so that a run that ended early goes on.
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

    def open(self, model: str) -> Checkpoint:
        """Open a model's headers.

        Raises:
            CheckpointError: it is no model, or broken.
            NotEnoughMemoryError: it does not fit.
        """
        return open_model(model, self._device, token=self._token)

    def known(self, name: str, identity: Any) -> dict[str, list[bool]] | None:
        """Return a model's verdicts by task, where an earlier run asked it everything."""
        stores = {task.name: self._store(name, identity, task) for task in self._tasks}
        if not all(store.is_file() for store in stores.values()):
            return None
        return self._read(stores)

    def verdicts(self, name: str, identity: Any, model: str) -> dict[str, list[bool]]:
        """Return by task whether each answer of a model is right, each task asked once.

        Args:
            name: what the model is called.
            identity: of its files, as plain data: another identity is another model.
            model: a folder, or namespace/name[@revision].

        Raises:
            CheckpointError: the model cannot be loaded.
            RecipeError: a task's check failed.
            StoppedError: the answers cannot be written.
        """
        stores = {task.name: self._store(name, identity, task) for task in self._tasks}
        missing = [task for task in self._tasks if not stores[task.name].is_file()]
        if missing:
            how = Loading(self._device, self._engine, self._token, self._cache)
            for task, answers in ask(model, missing, how, self._limit, self._say):
                with _written_to(self._folder):
                    stores[task].parent.mkdir(parents=True, exist_ok=True)
                    write_durably(stores[task], json.dumps(answers).encode())
        return self._read(stores)

    def write(self, verdicts: Verdicts) -> dict[str, Any]:
        """Write table, picture and JSON of all verdicts, and return the JSON's content.

        Raises:
            StoppedError: they cannot be written.
        """
        with _written_to(self._folder):
            self._folder.mkdir(parents=True, exist_ok=True)
            for file, data in evaluation_files(verdicts).items():
                write_durably(self._folder / file, data)
        return evaluation(verdicts)

    def _read(self, stores: Mapping[str, Path]) -> dict[str, list[bool]]:
        verdicts = {}
        for task, path in stores.items():
            verdicts[task], dataset = json.loads(path.read_text(encoding="utf-8"))
            self.datasets |= {task: dataset} if dataset else {}
        return verdicts

    def _store(self, name: str, identity: Any, task: Task) -> Path:
        asked: Any = [task.name, self._limit]
        if isinstance(task, Questions):
            asked += [task.prompts, [dict(rule) for rule in task.rules], task.new_tokens]
        elif task.folder is not None:
            asked += [sorted(p.read_text("utf-8") for p in task.folder.glob("*.y*ml"))]
        # Two engines may answer a question differently: their answers are never mixed.
        asked += ["vllm"] if self._engine == "vllm" else []
        known = json.dumps([name, identity, asked], default=str)
        return self._folder / "answers" / f"{hashlib.sha256(known.encode()).hexdigest()[:32]}.json"


def evaluate_models(models: Sequence[str], examination: Examination) -> dict[str, Any]:
    """Ask models the same questions, write what they answered, and return it.

    Args:
        models: folders, or namespace/name[@revision]; the first is what the others are held
            against.
        examination: the questions.

    Raises:
        RecipeError: there is no model, or a task's check failed.
        CheckpointError: a model is none, or broken.
        NotEnoughMemoryError: a model does not fit.
        StoppedError: the results cannot be written.
    """
    names = list(dict.fromkeys(models))
    if not names:
        raise RecipeError("an evaluation needs at least one model.")
    # All of them before the first is asked: a typo in the last name must not cost hours.
    opened = {name: examination.open(name) for name in names}
    verdicts = {}
    for name, checkpoint in opened.items():
        verdicts[name] = examination.verdicts(name, checkpoint.identity, name)
        checkpoint.close()
    return examination.write(verdicts)


@contextmanager
def _written_to(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as exc:
        raise StoppedError(
            f"the evaluation cannot be written to {folder}: {exc.strerror}."
        ) from exc
