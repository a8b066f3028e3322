"""What a worker asks once it has merged: a visitor's questions, or the built-in example's."""

import contextlib
import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from resmerge_stream.device import usable_cores
from resmerge_stream.errors import RecipeError, ResMergeError
from resmerge_stream.planning.request import Request
from resmerge_stream.sources import Checkpoint

from ..examples import on_this_machine
from ..questions import parse_questions

Say = Callable[[dict[str, Any]], None]
_QUESTIONS = "questions"


def ask_built_in(merged: str, prompts: int, say: Say) -> None:
    """Ask the built-in models and their merge questions that training never asked, if any."""
    if not prompts:
        return
    from resmerge_stream.experts.group import demo_accuracies

    found = demo_accuracies(
        {"merged": merged}, prompts, say=lambda name: say({"event": "asking", "model": name})
    )
    table = {
        model: {task: list(share) for task, share in row.items()} for model, row in found.items()
    }
    say({"event": "accuracies", "accuracies": table})


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
    """Ask base, experts and merge a visitor's questions; what cannot be asked is said.

    Args:
        asked: the merge.
        questions: as `parse_questions` takes them.
        merged: the folder or repository of the merge.
        token: to read with.
        folder: for the models while they are asked; removed afterwards.
        seconds: that it may take, estimated before it begins.
        say: takes events: ``asking`` for each model, then ``accuracies``, or ``unasked``.
    """
    rules = parse_questions(questions)
    recipe = on_this_machine(asked.recipe)
    refs = [*([recipe.base] if recipe.base is not None else []), *recipe.experts]
    shown = [*([asked.recipe.base] if asked.recipe.base is not None else []), *asked.recipe.experts]
    places = {str(name): str(ref) for name, ref in zip(shown, refs, strict=True)}
    try:
        found = _shares({**places, "merged": merged}, rules, token, folder, seconds, say)
    except ResMergeError as exc:
        say({"event": "unasked", "message": str(exc)})
    else:
        say({"event": "accuracies", "accuracies": found})
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _shares(
    places: Mapping[str, str],
    rules: list[dict[str, Any]],
    token: str | bool,
    folder: Path,
    seconds: float,
    say: Say,
) -> dict[str, dict[str, list[float]]]:
    from resmerge_stream.evaluation.results import evaluation
    from resmerge_stream.evaluation.run import Examination
    from resmerge_stream.sources.adapter import AdapterCheckpoint

    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{_QUESTIONS}.jsonl"
    path.write_text("".join(json.dumps(rule) + "\n" for rule in rules), encoding="utf-8")
    examination = Examination(
        [str(path)], out=folder, limit=len(rules), token=token, cache=folder / "hub"
    )
    verdicts = {}
    with contextlib.ExitStack() as stack:
        opened = {
            name: stack.enter_context(contextlib.closing(examination.open(place)))
            for name, place in places.items()
        }
        # An adapter is no model by itself.
        whole = {n: c for n, c in opened.items() if not isinstance(c, AdapterCheckpoint)}
        _refuse_slow(list(whole.values()), rules, seconds)
        for name, checkpoint in whole.items():
            say({"event": "asking", "model": name})
            verdicts[name] = examination.verdicts(name, checkpoint.identity, places[name])
    keys = ("accuracy", "low", "high", "n")
    return {
        name: {_QUESTIONS: [float(row[_QUESTIONS][key]) for key in keys]}
        for name, row in evaluation(verdicts)["models"].items()
    }


def _refuse_slow(
    models: Sequence[Checkpoint], rules: Sequence[Mapping[str, Any]], seconds: float
) -> None:
    from resmerge_stream.evaluation.machines import cpu_seconds

    numel = sum(math.prod(t.spec.shape) for model in models for t in model.tensors.values())
    tokens = max(rule["max_new_tokens"] for rule in rules)
    needed = cpu_seconds(numel, len(models), len(rules), tokens, usable_cores())
    if needed > seconds:
        raise RecipeError(
            f"these models would take about {needed / 60:.0f} minutes to answer here, and a "
            f"visitor has {seconds / 60:.0f}. Ask them as a Job."
        )
