"""Several methods' merges evaluated: base, experts and each merge asked the same questions."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..errors import RecipeError, StoppedError
from ..planning.plan import Plan
from ..report.card import render_card
from ..run.engine import run_merge
from ..run.events import Event, Finished
from ..sinks.folder import REPORT
from ..sources.adapter import AdapterCheckpoint
from ..studies.compare import run_comparison
from ..studies.compare_plan import Comparison
from ..studies.compare_report import comparison_files, write_files
from .card import into_card
from .results import evaluation
from .run import Examination

Keep = Literal["all", "best"]
KEEP: tuple[Keep, ...] = ("all", "best")


def run_contest(
    comparison: Comparison,
    examination: Examination,
    *,
    keep: Keep = "all",
    work_dir: str | Path | None = None,
) -> Iterator[Event]:
    """Merge by several methods, ask base, experts and merges, and say which merge is best.

    A stopped contest continues with the same command: what was merged and answered is kept.

    Args:
        comparison: from `plan_comparison`, with weights.
        examination: the questions; its files go into its own folder.
        keep: ``all`` merges in one pass and keeps every model; ``best`` merges one method after
            another and removes a model's files once another is better, so that two are on disk
            at a time. The reports of those removed stay in ``reports/``.
        work_dir: as for `run_comparison`.

    Yields:
        What `run_comparison` yields; the last event's report has ``best`` and ``evaluation``.

    Raises:
        RecipeError: the comparison writes no weights, or a task's check failed.
        ResMergeError: as `run_comparison` and `evaluate_models`.
    """
    if comparison.report_only:
        raise RecipeError("a comparison that writes reports only leaves no model to evaluate.")
    verdicts = {}
    for name in models_of(comparison.first):
        opened = examination.open(name)
        verdicts[name] = examination.verdicts(name, opened.identity, name)
        opened.close()
    contest = _Contest(comparison, examination, verdicts)
    run = contest.one_pass if keep == "all" else contest.one_after_another
    for event in run(work_dir):
        if not isinstance(event, Finished):
            yield event
    document, best = examination.write(verdicts), contest.best()
    for label in comparison.plans if keep == "all" else (best,):
        into_card(comparison.out / label, label, document)
    table = json.loads((comparison.out / "comparison.json").read_text(encoding="utf-8"))
    yield Finished(where=str(comparison.out), report=table | {"best": best, "evaluation": document})


def models_of(plan: Plan) -> list[str]:
    """Return the ids of the models that are merged, but for adapters: those are no models alone."""
    base = [plan.recipe.base] if plan.recipe.base is not None else []
    experts = zip(plan.recipe.experts, plan.experts, strict=True)
    whole = [ref for ref, opened in experts if not isinstance(opened, AdapterCheckpoint)]
    return list(dict.fromkeys(str(ref) for ref in (*base, *whole)))


@dataclass(slots=True)
class _Contest:
    """The merges so far, and what each answered; `verdicts` holds base and experts too."""

    comparison: Comparison
    examination: Examination
    verdicts: dict[str, dict[str, list[bool]]]

    def one_pass(self, work_dir: str | Path | None) -> Iterator[Event]:
        """Merge all in one pass, then ask all."""
        yield from run_comparison(self.comparison, work_dir=work_dir)
        for label in self.comparison.plans:
            self._ask(label)

    def one_after_another(self, work_dir: str | Path | None) -> Iterator[Event]:
        """Merge and ask each, and remove what is beaten; then write the comparison's table."""
        reports = {}
        for label, plan in self.comparison.plans.items():
            folder = self.comparison.out / label
            known = self.examination.known(label, plan.plan_hash)
            if known is not None and not folder.exists() and self._report_of(label).is_file():
                self.verdicts[label] = known
            else:
                yield from run_merge(plan, out=folder, work_dir=work_dir)
                self._ask(label)
            for other in self.comparison.plans:
                if other in self.verdicts and other != self.best():
                    self._remove(other)
        best = self.best()
        for label in self.comparison.plans:
            path = self.comparison.out / best / REPORT if label == best else self._report_of(label)
            reports[label] = json.loads(path.read_text(encoding="utf-8"))
        peak = self.comparison.peak_memory_bytes
        write_files(self.comparison.out, comparison_files(reports, None, peak=peak))

    def best(self) -> str:
        """Return the method whose merge answers most, as a mean over tasks; the first of equals."""
        models = evaluation(self.verdicts)["models"]
        asked = [label for label in self.comparison.plans if label in self.verdicts]
        return max(asked, key=lambda label: float(models[label]["mean"]["accuracy"]))

    def _ask(self, label: str) -> None:
        # By the plan, which decides the bytes: the answers outlive the model's files.
        identity = self.comparison.plans[label].plan_hash
        folder = str(self.comparison.out / label)
        self.verdicts[label] = self.examination.verdicts(label, identity, folder)

    def _report_of(self, label: str) -> Path:
        return self.comparison.out / "reports" / f"{label}.json"

    def _remove(self, label: str) -> None:
        """Remove the files that the merge wrote, and no others; its report moves."""
        plan, folder = self.comparison.plans[label], self.comparison.out / label
        if not (folder / REPORT).is_file():
            return
        try:
            report = json.loads((folder / REPORT).read_text(encoding="utf-8"))
            cards = render_card(plan, report)
            weights = [file["name"] for file in report["files"]]
            self._report_of(label).parent.mkdir(exist_ok=True)
            os.replace(folder / REPORT, self._report_of(label))
            for name in (*weights, *plan.side_files(), *cards):
                (folder / name).unlink(missing_ok=True)
            folders = [folder, *(path for path in folder.rglob("*") if path.is_dir())]
            for empty in sorted(folders, reverse=True):
                with contextlib.suppress(OSError):  # somebody else's file keeps its folder
                    empty.rmdir()
        except OSError as exc:
            raise StoppedError(f"{folder} cannot be removed: {exc.strerror}.") from exc
