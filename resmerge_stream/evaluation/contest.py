"""Several methods' merges evaluated: base, experts and each merge asked the same questions."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

from ..documents import load_json
from ..errors import CheckpointError, PlanRefusedError, RecipeError
from ..experts.group import name_of
from ..planning.plan import Plan
from ..run.engine import run_merge
from ..run.events import Event, Finished
from ..sinks.folder import REPORT
from ..sources import Checkpoint
from ..studies.compare import earlier_similarity, run_comparison
from ..studies.compare_plan import Comparison
from ..studies.compare_report import comparison_files, write_files
from .candidates import Candidates, InMemory, OnDisk, overwrites, report_apart
from .card import into_card
from .choice import AtLeast, choose, falls_short, reported
from .results import evaluation, sentence
from .run import Examination, halved, woven

Keep = Literal["all", "best", "none"]

_Verdicts = dict[str, Mapping[str, Sequence[bool]]]


def run_contest(
    comparison: Comparison,
    examination: Examination,
    *,
    keep: Keep = "all",
    at_least: AtLeast | None = None,
    work_dir: str | Path | None = None,
) -> Iterator[Event]:
    """Merge by several methods, ask base, experts and merges, and say which merge is best.

    Every other question chooses, and the rest report: what is said of the best is not what made it
    the best. A stopped contest continues with the same command: what was answered is kept.

    Args:
        comparison: from `plan_comparison`, with weights.
        examination: the questions; its files go into its own folder.
        keep: ``all`` merges in one pass, keeps every model and asks it everything. ``best`` asks
            the candidates the half that chooses, the best the other half, and writes that one.
            Until then they are in memory, where one loaded model takes the weights of one after
            another. Where memory does not hold that, or a candidate is not the base with other
            weights (other tokens), each is merged to disk, and removed once another is better.
            ``none`` asks all of them everything in the same way, and writes none.
        at_least: what the best must reach on the half that reports, or nothing is kept: the
            ``base``, or all of base and ``experts``.
        work_dir: as for `run_comparison`.

    Yields:
        What `run_comparison` yields; the last event's report has ``best`` and ``evaluation``.

    Raises:
        RecipeError: the comparison writes no weights, a task's check failed, or a task asks one
            question.
        PlanRefusedError: the best does not reach what it must.
        ResMergeError: as `run_comparison` and `evaluate_models`.
    """
    if comparison.report_only:
        raise RecipeError("a comparison that writes reports only leaves no model to evaluate.")
    if at_least is not None and keep != "best":
        raise RecipeError("the least score says whether the best is kept: keep the best alone.")
    examination.check_halves()
    sources, unasked = _sources_asked(models_of(comparison.first), examination)
    contest = _Contest(comparison, examination, sources)
    if keep == "best":
        document = yield from contest.best_kept(at_least, work_dir)
    else:
        run = contest.all_kept if keep == "all" else contest.none_kept
        document = yield from run(work_dir)
    document |= {"unasked": unasked} if unasked else {}
    choice = document["choice"]
    contest.write(document)
    if choice["kept"] == "none":
        raise PlanRefusedError(
            f"{sentence(choice)}. More is answered by {', '.join(choice['below'])}. The answers "
            f"are in {comparison.out}.",
            kind="below",
        )
    written = {"all": list(comparison.plans), "best": [choice["best"]], "none": []}
    for label in written[keep]:
        into_card(comparison.out / label, label, document)
    table = load_json((comparison.out / "comparison.json").read_bytes())
    told = table | {"best": choice["best"], "evaluation": document}
    yield Finished(where=str(comparison.out), report=told)


def models_of(plan: Plan) -> list[str]:
    """Return the ids of the models that are merged, the base first."""
    return list(dict.fromkeys(str(ref) for ref in plan.recipe.models))


def _sources_asked(
    models: Sequence[str], examination: Examination
) -> tuple[_Verdicts, dict[str, str]]:
    """Ask base and experts; return their verdicts, and why an expert could not be asked."""
    verdicts: _Verdicts = {}
    unasked: dict[str, str] = {}
    places = {name_of(place): place for place in models}
    base = next(iter(places))
    with contextlib.ExitStack() as stack:
        opened: dict[str, Checkpoint] = {}
        for name, place in places.items():
            try:
                checkpoint = examination.open(place, opened.get(base))
                opened[name] = stack.enter_context(contextlib.closing(checkpoint))
                verdicts[name] = examination.verdicts(name, opened, places)
            except CheckpointError as exc:
                if name == base:
                    raise
                unasked[name] = str(exc)
    return verdicts, unasked


@dataclass(slots=True)
class _Contest:
    """What base and experts answered, and the candidates on the half that chooses."""

    comparison: Comparison
    examination: Examination
    sources: _Verdicts
    choosing: _Verdicts = field(default_factory=dict)

    def all_kept(self, work_dir: str | Path | None) -> Generator[Event, None, dict[str, Any]]:
        """Merge all in one pass, then ask all everything."""
        for event in run_comparison(self.comparison, work_dir=work_dir):
            if not isinstance(event, Finished):
                yield event
        places = {label: str(self.comparison.out / label) for label in self.comparison.plans}
        verdicts = dict(self.sources)
        with contextlib.ExitStack() as stack:
            opened = {
                label: stack.enter_context(contextlib.closing(self.examination.open(place)))
                for label, place in places.items()
            }
            for label in opened:
                verdicts[label] = self.examination.verdicts(label, opened, places)
                self.choosing[label] = halved(verdicts[label], 0)
        best = halved(verdicts[self._chosen()["best"]], 1)
        return evaluation(verdicts) | {"choice": self._reported(best, "all")}

    def none_kept(self, work_dir: str | Path | None) -> Generator[Event, None, dict[str, Any]]:
        """Ask all everything, and let each go."""
        verdicts = dict(self.sources)
        with self._candidates(work_dir) as candidates:
            rest = list(self.comparison.plans)
            while rest:
                group, rest = rest[: candidates.together], rest[candidates.together :]
                yield from candidates.make(group)
                for label in group:
                    halves = [self._ask(label, half, candidates) for half in (0, 1)]
                    verdicts[label] = woven(*halves)
                    candidates.drop(label)
        best = halved(verdicts[self._chosen()["best"]], 1)
        return evaluation(verdicts) | {"choice": self._reported(best, "all")}

    def best_kept(
        self, at_least: AtLeast | None, work_dir: str | Path | None
    ) -> Generator[Event, None, dict[str, Any]]:
        """Ask all the questions that choose and the best the others; write the best alone."""
        plans = self.comparison.plans
        with self._candidates(work_dir) as candidates:
            # An earlier run may have asked a candidate, and left its report.
            known = self.examination.half_known
            rest = [
                label
                for label, plan in plans.items()
                if not (known(label, plan.plan_hash, 0) and self._report_of(label).is_file())
            ]
            for label in plans:
                if label not in rest:
                    self._ask(label, 0, candidates)
            while rest:
                group, rest = rest[: candidates.together], rest[candidates.together :]
                yield from candidates.make(group)
                for label in group:
                    self._ask(label, 0, candidates)
                for label in self.choosing:
                    if label != self._chosen()["best"]:
                        candidates.drop(label)
            best = str(self._chosen()["best"])
            if not self.examination.half_known(best, plans[best].plan_hash, 1):
                yield from candidates.make([best])
            of_best = self._ask(best, 1, candidates)
            choice = self._reported(of_best, "best")
            if at_least is not None and falls_short(choice, at_least):
                choice["kept"] = "none"
                candidates.drop(best)
        if choice["kept"] == "best":
            for event in run_merge(plans[best], out=self.comparison.out / best, work_dir=work_dir):
                if not isinstance(event, Finished):
                    yield event
            report_apart(self.comparison, best).unlink(missing_ok=True)
        sources = {name: halved(verdicts, 1) for name, verdicts in self.sources.items()}
        return evaluation({**sources, best: of_best}) | {"choice": choice}

    def write(self, document: Mapping[str, Any]) -> None:
        """Write the evaluation, and the comparison's table with the choice below it."""
        self.examination.write(document)
        reports = {
            label: load_json(self._report_of(label).read_bytes()) for label in self.comparison.plans
        }
        files = comparison_files(
            reports,
            earlier_similarity(self.comparison),
            peak=self.comparison.peak_memory_bytes,
            choice=sentence(document["choice"]),
        )
        write_files(self.comparison.out, files)

    @contextlib.contextmanager
    def _candidates(self, work_dir: str | Path | None) -> Iterator[Candidates]:
        """Load the base to hold the candidates in turn, where it can."""
        first, loaded = self.comparison.first, self.examination.loaded
        if first.recipe.base is not None:
            with loaded(str(first.recipe.base)) as model:
                found = InMemory(self.comparison, model, work_dir)
                plans = self.comparison.plans.values()
                if found.together > 0 and all(overwrites(model, plan) for plan in plans):
                    yield found
                    return
        yield OnDisk(self.comparison, loaded, work_dir)

    def _ask(self, label: str, half: int, candidates: Candidates) -> dict[str, list[bool]]:
        # By the plan, which decides the bytes: the answers outlive the model.
        identity = self.comparison.plans[label].plan_hash
        model_of = partial(candidates.model_of, label)
        verdicts = self.examination.half_verdicts(label, identity, half, model_of)
        if half == 0:
            self.choosing[label] = verdicts
        return verdicts

    def _chosen(self) -> dict[str, Any]:
        asked = [label for label in self.comparison.plans if label in self.choosing]
        sources = {name: halved(verdicts, 0) for name, verdicts in self.sources.items()}
        return choose({**sources, **{label: self.choosing[label] for label in asked}}, asked)

    def _reported(self, of_best: Mapping[str, Sequence[bool]], kept: str) -> dict[str, Any]:
        chosen = self._chosen()
        sources = {name: halved(verdicts, 1) for name, verdicts in self.sources.items()}
        return reported(chosen, {**sources, chosen["best"]: of_best}, kept)

    def _report_of(self, label: str) -> Path:
        inside = self.comparison.out / label / REPORT
        return inside if inside.is_file() else report_apart(self.comparison, label)
