"""Shares of right answers as bars, then task by task; of the example, and of any evaluation."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from .words import esc, table

# A stranger's report may have an evaluation of anything.
_MOST_MODELS, _MOST_TASKS, _NAME = 20, 30, 80
Shares = Mapping[str, Mapping[str, Sequence[float]]]


def shares_html(found: Shares, own: str) -> str:
    """Return how many questions each model answers rightly.

    Args:
        found: by model and task: the share from 0 to 1, both ends of its interval, questions asked.
        own: the merge, which stands out.
    """
    if not found:
        return ""
    tasks = list(next(iter(found.values())))
    means = {model: sum(row[t][0] for t in tasks) / len(tasks) for model, row in found.items()}
    halves = {
        # Of a mean of tasks that are asked apart.
        model: math.hypot(*((row[t][2] - row[t][1]) / 2 for t in tasks)) / len(tasks)
        for model, row in found.items()
    }
    bars = "".join(
        f"<li{' class=rm-own' * (model == own)}><span>{esc(model)}</span>"
        f'<i><i style="width:{100 * mean:.0f}%"></i></i>'
        f"<b>{mean:.0%} <small>± {100 * halves[model]:.0f}</small></b></li>"
        for model, mean in means.items()
    )
    rows = [
        (esc(model), *(f"{row[task][0]:.0%}{_interval(row[task])}" for task in tasks))
        for model, row in found.items()
    ]
    counts = {int(row[task][3]) for row in found.values() for task in tasks}
    asked = f"{max(counts)} " if len(counts) == 1 else ""
    caption = f"Right answers to {asked}questions a task, with 95 % intervals"
    shown = table(("Model", *(esc(task) for task in tasks)), rows, caption)
    of = "of one task" if len(tasks) == 1 else f"mean of {len(tasks)} tasks"
    each = f"{asked}questions{' a task' if len(tasks) > 1 else ''}, " if asked else ""
    return (
        f"<h3>Right answers, {of}</h3>"
        f'<p class="rm-soft">{each}95 % intervals</p>'
        f'<ul class="rm-bars">{bars}</ul>'
        f"<details><summary>Task by task</summary>{shown}</details>"
    )


def evaluated(report: Mapping[str, Any]) -> dict[str, dict[str, list[float]]]:
    """Return the shares of a report's evaluation, as `shares_html` takes them; empty without one.

    Args:
        report: anybody's; what is malformed is left out, and a table that is not whole is none.
    """
    document = report.get("evaluation")
    models = document.get("models") if isinstance(document, dict) else None
    if not isinstance(models, dict):
        return {}
    found = {
        str(name)[:_NAME]: {
            str(task)[:_NAME]: share
            for task, entry in list(row.items())[:_MOST_TASKS]
            if task != "mean" and (share := _share(entry)) is not None
        }
        for name, row in list(models.items())[:_MOST_MODELS]
        if isinstance(row, dict)
    }
    tasks = {tuple(row) for row in found.values()}
    return found if len(tasks) == 1 and tasks != {()} else {}


def _share(entry: object) -> list[float] | None:
    if not isinstance(entry, dict):
        return None
    values = [entry.get(key) for key in ("accuracy", "low", "high", "n")]
    if not all(isinstance(v, int | float) and not isinstance(v, bool) for v in values):
        return None
    share, low, high, count = (float(value) for value in values)  # type: ignore[arg-type]
    is_share = 0 <= low <= share <= high <= 1 and 0 < count < 1e9
    return [share, low, high, count] if is_share else None


def _interval(share: Sequence[float]) -> str:
    return f' <span class="rm-range">({share[1]:.0%} … {share[2]:.0%})</span>'
