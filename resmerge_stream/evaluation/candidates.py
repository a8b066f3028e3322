"""Merges while they are asked: in one model in memory after another, or each in its folder."""

from __future__ import annotations

import contextlib
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from ..device import available_memory
from ..documents import load_json
from ..errors import StoppedError
from ..planning.plan import Plan
from ..report.card import render_card
from ..run.engine import run_merge
from ..run.events import Event, Finished
from ..sinks.folder import REPORT
from ..sinks.tensors import TensorSink
from ..studies.compare import run_comparison
from ..studies.compare_plan import Comparison
from .engines import Answerer

# What a config may say of how weights are stored, and not of what a model computes.
_OF_STORAGE = {"dtype", "torch_dtype", "quantization_config", "transformers_version"}


class Candidates(ABC):
    """Merges of a comparison, some at a time.

    Attributes:
        together: how many are made in one pass.
    """

    together: int

    @abstractmethod
    def make(self, labels: Sequence[str]) -> Iterator[Event]:
        """Merge by some methods; those that are there are not merged again."""

    @abstractmethod
    def model_of(self, label: str) -> AbstractContextManager[Answerer]:
        """Load a merge that was made."""

    @abstractmethod
    def drop(self, label: str) -> None:
        """Let a merge go, but for its report."""


class InMemory(Candidates):
    """Merges whose weights are held, and overwrite those of one loaded model in their turn.

    Args:
        comparison: whose plans are merged.
        model: the base, loaded.
        work_dir: as for `run_comparison`.
    """

    def __init__(
        self, comparison: Comparison, model: Answerer, work_dir: str | Path | None
    ) -> None:
        self._comparison, self._model, self._work_dir = comparison, model, work_dir
        self._held: dict[str, dict[str, Tensor]] = {}
        each = sum(shard.nbytes for shard in comparison.first.shards)
        room = available_memory() - comparison.peak_memory_bytes
        self.together = room // max(each, 1) - 1  # the best so far stays beside them

    def make(self, labels: Sequence[str]) -> Iterator[Event]:
        """Merge by some methods in one pass over the sources; no weight is written."""
        wanted = [label for label in labels if label not in self._held]
        if not wanted:
            return
        held = {label: dict[str, Tensor]() for label in wanted}
        some = replace(
            self._comparison,
            report_only=True,
            plans={label: self._comparison.plans[label] for label in wanted},
        )
        run = run_comparison(
            some,
            work_dir=self._work_dir,
            sink_of=lambda label, path: TensorSink(held[label].__setitem__, path),
        )
        yield from (event for event in run if not isinstance(event, Finished))
        self._held |= held

    @contextlib.contextmanager
    def model_of(self, label: str) -> Iterator[Answerer]:
        """Put a merge's weights into the model."""
        for name, weight in self._held[label].items():
            self._model.overwrite(name, weight)
        yield self._model

    def drop(self, label: str) -> None:
        """Let its weights go."""
        self._held.pop(label, None)


class OnDisk(Candidates):
    """Merges that are written, each into its folder.

    Args:
        comparison: whose plans are merged.
        load: loads a folder.
        work_dir: as for `run_merge`.
    """

    together = 1

    def __init__(
        self,
        comparison: Comparison,
        load: Callable[[str], AbstractContextManager[Answerer]],
        work_dir: str | Path | None,
    ) -> None:
        self._comparison, self._load, self._work_dir = comparison, load, work_dir

    def make(self, labels: Sequence[str]) -> Iterator[Event]:
        """Merge by one method after another; a stopped merge goes on."""
        for label in labels:
            run = run_merge(
                self._comparison.plans[label],
                out=self._comparison.out / label,
                work_dir=self._work_dir,
            )
            yield from (event for event in run if not isinstance(event, Finished))

    def model_of(self, label: str) -> AbstractContextManager[Answerer]:
        """Load its folder."""
        return self._load(str(self._comparison.out / label))

    def drop(self, label: str) -> None:
        """Remove the files that the merge wrote, and no others; its report moves."""
        plan, folder = self._comparison.plans[label], self._comparison.out / label
        if not (folder / REPORT).is_file():
            return
        try:
            report = load_json((folder / REPORT).read_bytes())
            cards = render_card(plan, report)
            weights = [file["name"] for file in report["files"]]
            apart = report_apart(self._comparison, label)
            apart.parent.mkdir(exist_ok=True)
            os.replace(folder / REPORT, apart)
            for name in (*weights, *plan.side_files(), *cards):
                (folder / name).unlink(missing_ok=True)
            folders = [folder, *(path for path in folder.rglob("*") if path.is_dir())]
            for empty in sorted(folders, reverse=True):
                with contextlib.suppress(OSError):  # somebody else's file keeps its folder
                    empty.rmdir()
        except OSError as exc:
            raise StoppedError(f"{folder} cannot be removed: {exc.strerror}.") from exc


def report_apart(comparison: Comparison, label: str) -> Path:
    """Return where the report of a merge lies whose model is not kept."""
    return comparison.out / "reports" / f"{label}.json"


def overwrites(model: Answerer, plan: Plan) -> bool:
    """Return whether a merge is the loaded base with other weights, and nothing else."""
    base = plan.base
    if base is None or not model.takes([tensor.spec for tensor in plan.tensors.values()]):
        return False
    files = plan.side_files()
    files.pop("model.safetensors.index.json", None)
    config = json.loads(files.pop("config.json"))
    differing = {key for key in {*config, *base.config} if config.get(key) != base.config.get(key)}
    return not differing - _OF_STORAGE and all(
        name in base.small_files and base.read_small(name) == data for name, data in files.items()
    )
