"""What models answered, as a table, a picture and JSON; and their differences, in pairs."""

from __future__ import annotations

import io
import itertools
import json
from collections.abc import Mapping, Sequence
from typing import Any

from ..experts.accuracy import mean_accuracy, paired_difference, wilson

# What is said before the name of the best: which models of a comparison are kept.
_KEPT = {"best": "kept", "all": "best:", "none": "nothing kept; the best is"}
# By model and task: whether each question was answered rightly.
Verdicts = Mapping[str, Mapping[str, Sequence[bool]]]


def evaluation_files(document: Mapping[str, Any]) -> dict[str, bytes]:
    """Return ``evaluation.json``, ``evaluation.md`` and ``evaluation.png`` by name.

    Args:
        document: from `evaluation`; ``unasked`` may say why a model was not asked, by name.
    """
    return {
        "evaluation.json": (json.dumps(document, indent=1) + "\n").encode(),
        "evaluation.md": (markdown(document) + "\n").encode(),
        "evaluation.png": _picture(document),
    }


def evaluation(verdicts: Verdicts) -> dict[str, Any]:
    """Return accuracies and paired differences as plain data, shares from 0 to 1.

    Args:
        verdicts: of every model on the same questions; the first model is the base.

    ``models`` has by model and task the share of right answers, its 95 % interval and how many
    were asked; "mean" is the mean over tasks. ``differences`` has every pair of models: the first
    less the second, and half of the 95 % interval.
    """
    models = {}
    for name, tasks in verdicts.items():
        shares = {task: wilson(sum(bits), len(bits)) for task, bits in tasks.items()}
        shares["mean"] = mean_accuracy(dict(shares))
        models[name] = {task: share._asdict() for task, share in shares.items()}
    differences = []
    for second, first in itertools.combinations(verdicts, 2):
        row: dict[str, Any] = {"model": first, "against": second}
        for task, bits in verdicts[first].items():
            row[task] = list(paired_difference([bits], [verdicts[second][task]]))
        pairs = [list(verdicts[name].values()) for name in (first, second)]
        row["mean"] = list(paired_difference(*pairs))
        differences.append(row)
    return {"version": 1, "models": models, "differences": differences}


def renamed(document: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """Return an evaluation with other names of its models; those without one keep theirs."""
    choice, unasked = document.get("choice"), document.get("unasked", {})
    every = {*document["models"], *unasked, *(choice["evaluation"]["models"] if choice else ())}
    names = {name: names.get(name, name) for name in every}
    if choice:
        below = {names[name]: lead for name, lead in choice["below"].items()}
        own = renamed(choice["evaluation"], names)
        against = {names[name]: lead for name, lead in choice["against"].items()}
        ends = {key: names[choice[key]] for key in ("base", "best")}
        choice = {**choice, **ends, "against": against, "below": below, "evaluation": own}
        document = {**document, "choice": choice}
    return {
        **document,
        **({"unasked": {names[name]: said for name, said in unasked.items()}} if unasked else {}),
        "models": {names[name]: row for name, row in document["models"].items()},
        "differences": [
            row | {key: names[row[key]] for key in ("model", "against")}
            for row in document["differences"]
        ],
    }


def markdown(document: Mapping[str, Any]) -> str:
    """Return an evaluation's tables; and how the best was chosen, where there was a choice."""
    models = document["models"]
    base = next(iter(models))
    tasks = list(models[base])
    lines = ["Right answers in %, with 95 % intervals (±).", "", *_shares_of(models)]
    for name, reason in document.get("unasked", {}).items():
        lines += ["", f"Not asked: `{name}`. {reason}"]
    rows = [row for row in document["differences"] if row["against"] == base]
    if rows:
        shown = [[f"`{row['model']}`", *(_points(*row[task]) for task in tasks)] for row in rows]
        lines += ["", f"Difference from `{base}` in points, same questions:", ""]
        lines += _table(["model", *tasks], shown)
    choice = document.get("choice")
    if choice:
        count = len(choice["against"]) + 1
        scores = (
            "The scores above are of all of them, that of the last line is of the other half"
            if choice["kept"] == "all"
            else "The scores above and in the last line are of the other half"
        )
        lines += [
            "",
            f"One half of the questions chose among {count} merges. {scores}. On the half that "
            "chose:",
            "",
            *_shares_of(choice["evaluation"]["models"]),
            "",
            "Leads of the best have 95 % intervals for all pairs of merges together (Bonferroni; "
            "Agresti and Min 2005).",
        ]
        for name, lead in choice["below"].items():
            than = "the base" if name == choice["base"] else "the expert"
            said = f"{choice['best']} answers less than {than} `{name}`: {_points(*lead)}."
            lines += ["", f"Warning: {said}"]
        lines += ["", sentence(choice)]
    return "\n".join(lines)


def sentence(choice: Mapping[str, Any]) -> str:
    """Return what was chosen, and how sure that is, in a line."""
    alike = {name: lead for name, lead in choice["against"].items() if lead[0] - lead[1] <= 0}
    said = f"{_KEPT[choice['kept']]} {choice['best']} ({100 * choice['score']:.1f})"
    if alike:
        nearest = sorted(alike, key=lambda name: float(alike[name][0]))
        names = [f"{name} ({_points(*alike[name])})" for name in nearest]
        if len(names) > 1:
            return f"{said}; not distinguishable: {', '.join(names)}"
        return f"{said}; {nearest[0]} is not distinguishable ({_points(*alike[nearest[0]])})"
    if choice["against"]:
        name, lead = min(choice["against"].items(), key=lambda item: float(item[1][0]))
        return f"{said}; better than every other: the next is {name} ({_points(*lead)})"
    return said


def _shares_of(models: Mapping[str, Any]) -> list[str]:
    tasks = list(next(iter(models.values())))
    rows = [[f"`{name}`"] for name in models]
    for row, shares in zip(rows, models.values(), strict=True):
        for share in (shares[task] for task in tasks):
            half = 50 * (share["high"] - share["low"])
            row.append(f"{100 * share['accuracy']:.1f} ± {half:.1f}")
    return _table(["model", *tasks], rows)


def _points(difference: float, half: float) -> str:
    return f"{100 * difference:+.1f} ± {100 * half:.1f}"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [header, ["---"] * len(header), *rows]
    return [f"| {' | '.join(line)} |" for line in lines]


def _picture(document: Mapping[str, Any]) -> bytes:
    """Return bars of every model's mean, with intervals, as PNG."""
    from matplotlib.figure import Figure

    models = document["models"]
    names = list(models)
    means = [models[name]["mean"] for name in names]
    figure = Figure(figsize=(6, 0.6 + 0.45 * len(names)), layout="constrained")
    axes = figure.subplots()
    widths = [100 * mean["accuracy"] for mean in means]
    halves = [50 * (mean["high"] - mean["low"]) for mean in means]
    places = list(range(len(names)))
    axes.barh(places, widths, xerr=halves, color="#3b6fb6", capsize=3)
    axes.set_yticks(places, [name[-40:] for name in names])
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    axes.set_xlabel("right answers, %, mean over tasks")
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=90, metadata={"Software": None})
    return data.getvalue()
