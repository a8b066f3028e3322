"""What a worker asks: a merge, or several merges that are compared; of a visitor, or built in."""

import contextlib
import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from resmerge_stream.device import usable_cores
from resmerge_stream.errors import CheckpointError, RecipeError, ResMergeError
from resmerge_stream.experts.group import on_this_machine
from resmerge_stream.methods import find_methods
from resmerge_stream.planning.request import Request
from resmerge_stream.run.events import Event, Finished, Planned
from resmerge_stream.sources import Checkpoint

from ..asked import web_request
from ..questions import parse_questions
from ..settings import read_settings

Say = Callable[[dict[str, Any]], None]
_QUESTIONS = "questions"


def ask_built_in(merged: str, prompts: int, *, folder: Path, say: Say) -> None:
    """Ask the built-in models and their merge questions that training never asked, if any.

    The scores are said, and put into the card of the merge.

    Args:
        merged: the merge's folder.
        prompts: a task; 0 asks nothing.
        folder: for the answers; removed afterwards.
        say: takes events: ``asking`` for each model, then ``accuracies``.
    """
    from resmerge_stream.evaluation.card import into_card
    from resmerge_stream.evaluation.run import Examination
    from resmerge_stream.experts.group import builtin_group
    from resmerge_stream.experts.tasks import TASKS

    if not prompts:
        return
    places = {**{name: str(path) for name, path in builtin_group().items()}, "merged": merged}
    try:
        examination = Examination(TASKS, out=folder, limit=prompts, device="cpu")
        document = _asked(places, examination, None, say)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    into_card(merged, "merged", document)
    say({"event": "accuracies", "accuracies": _shares(document)})


def ask_own(
    asked: Request,
    questions: str,
    merged: str,
    *,
    token: str | bool,
    folder: Path,
    seconds: float,
    say: Say,
) -> None:
    """Ask base, experts and merge a visitor's questions; a model that cannot be asked is named.

    Args:
        asked: the merge.
        questions: as `parse_questions` takes them.
        merged: the folder or repository of the merge.
        token: to read with.
        folder: for the models while they are asked; removed afterwards.
        seconds: that it may take, estimated before it begins.
        say: takes events: ``asking`` for each model, then ``accuracies``, or ``unasked``.
    """
    from resmerge_stream.evaluation.run import Examination

    rules = parse_questions(questions)
    recipe = on_this_machine(asked.recipe)
    refs = [*([recipe.base] if recipe.base is not None else []), *recipe.experts]
    shown = [*([asked.recipe.base] if asked.recipe.base is not None else []), *asked.recipe.experts]
    places = {str(name): str(ref) for name, ref in zip(shown, refs, strict=True)}
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{_QUESTIONS}.jsonl"
    path.write_text("".join(json.dumps(rule) + "\n" for rule in rules), encoding="utf-8")
    try:
        examination = Examination(
            [str(path)], out=folder, limit=len(rules), token=token, cache=folder / "hub"
        )
        found = _asked({**places, "merged": merged}, examination, (rules, seconds), say)
    except ResMergeError as exc:
        say({"event": "unasked", "message": str(exc)})
    else:
        say({"event": "accuracies", "accuracies": _shares(found)})
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def compared(request: Mapping[str, Any], say: Say) -> Iterator[Event]:
    """Merge by several methods, ask base, experts and merges the same; no model is written.

    Args:
        request: to a worker, whose ``asked`` names ``methods``.
        say: takes events: ``asking`` for each model, then ``accuracies`` and ``chosen``.

    Raises:
        ResMergeError: it is refused, or stopped.
    """
    from resmerge_stream.evaluation.contest import run_contest
    from resmerge_stream.evaluation.results import renamed, sentence
    from resmerge_stream.evaluation.run import Examination
    from resmerge_stream.experts.tasks import TASKS
    from resmerge_stream.studies.compare_plan import plan_comparison

    document = request["asked"]
    asked = web_request(document, read_settings())
    rules = parse_questions(str(document.get("questions") or ""))
    token = request.get("token") or False
    folder = Path(request["work_dir"]) / "compared"
    shutil.rmtree(folder, ignore_errors=True)
    recipe = on_this_machine(asked.recipe)
    comparison = plan_comparison(
        recipe, document["methods"], asked.options, out=folder, token=token
    )
    try:
        if rules:
            specs = [tensor.spec for tensor in comparison.first.tensors.values()]
            models = len(recipe.models) + len(comparison.plans)
            numel = models * sum(math.prod(spec.shape) for spec in specs)
            _refuse_slow(numel, models, rules, float(request.get("ask_seconds") or 0.0))
        folder.mkdir(parents=True)
        path = folder / f"{_QUESTIONS}.jsonl"
        path.write_text("".join(json.dumps(rule) + "\n" for rule in rules), encoding="utf-8")
        examination = Examination(
            [str(path)] if rules else TASKS,
            out=folder,
            limit=len(rules) or int(request.get("prompts") or 0),
            device="cpu",
            token=token,
            cache=folder / "hub",
            say=lambda text: say({"event": "asking", "model": text.rpartition(": ")[0]}),
        )
        written = sum(plan.write_bytes for plan in comparison.plans.values())
        for event in run_contest(
            comparison, examination, keep="none", work_dir=request["work_dir"]
        ):
            if isinstance(event, Planned):
                count = sum(len(plan.tensors) for plan in comparison.plans.values())
                seconds = sum(plan.seconds_estimate for plan in comparison.plans.values())
                first = comparison.first.to_dict()
                told = {"tensors": count, "write_bytes": written, "seconds_estimate": seconds}
                event = replace(event, plan={**first, **event.plan, **told})
            elif isinstance(event, Finished):
                titles = {name: find_methods()[name].title for name in document["methods"]}
                found = renamed(event.report["evaluation"], titles)
                say({"event": "accuracies", "accuracies": _shares(found)})
                say({"event": "chosen", "choice": sentence(found["choice"])})
                event = Finished(where="", report={})
            yield event
    finally:
        comparison.close()
        shutil.rmtree(folder, ignore_errors=True)


def _asked(
    places: Mapping[str, str],
    examination: Any,
    limit: tuple[Sequence[Mapping[str, Any]], float] | None,
    say: Say,
) -> dict[str, Any]:
    """Ask models, the base first, and return the evaluation; who cannot be asked is named."""
    from resmerge_stream.evaluation.results import evaluation

    verdicts = {}
    with contextlib.ExitStack() as stack:
        opened: dict[str, Checkpoint] = {}
        for name, place in places.items():
            checkpoint = examination.open(place, next(iter(opened.values()), None))
            opened[name] = stack.enter_context(contextlib.closing(checkpoint))
        if limit is not None:
            models = opened.values()
            numel = sum(math.prod(t.spec.shape) for one in models for t in one.tensors.values())
            _refuse_slow(numel, len(models), *limit)
        for number, name in enumerate(opened):
            say({"event": "asking", "model": name})
            try:
                verdicts[name] = examination.verdicts(name, opened, places)
            except CheckpointError as exc:
                if not number:
                    raise
                say({"event": "unasked", "message": str(exc)})
    return evaluation(verdicts)


def _shares(document: Mapping[str, Any]) -> dict[str, dict[str, list[float]]]:
    """Return the shares of an evaluation as a job's record keeps them."""
    keys = ("accuracy", "low", "high", "n")
    return {
        name: {
            task: [float(share[key]) for key in keys]
            for task, share in row.items()
            if task != "mean"
        }
        for name, row in document["models"].items()
    }


def _refuse_slow(
    numel: int, models: int, rules: Sequence[Mapping[str, Any]], seconds: float
) -> None:
    from resmerge_stream.evaluation.machines import cpu_seconds

    tokens = max(rule["max_new_tokens"] for rule in rules)
    needed = cpu_seconds(numel, models, len(rules), tokens, usable_cores())
    if needed > seconds:
        raise RecipeError(
            f"these models would take about {needed / 60:.0f} minutes to answer here, and a "
            f"visitor has {seconds / 60:.0f}. Ask them as a Job."
        )
