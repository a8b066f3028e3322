"""What models answered, as a table, a picture and JSON; and their differences, in pairs."""

from __future__ import annotations

import io
import itertools
import json
from collections.abc import Mapping, Sequence
from typing import Any

from ..experts.accuracy import mean_accuracy, paired_difference, wilson

# By model and task: whether each question was answered rightly.
Verdicts = Mapping[str, Mapping[str, Sequence[bool]]]


def evaluation_files(verdicts: Verdicts) -> dict[str, bytes]:
    """Return ``evaluation.json``, ``evaluation.md`` and ``evaluation.png`` by name.

    Args:
        verdicts: of every model on the same questions; the first model is the base.
    """
    document = evaluation(verdicts)
    return {
        "evaluation.json": (json.dumps(document, indent=1) + "\n").encode(),
        "evaluation.md": (markdown(document) + "\n").encode(),
        "evaluation.png": _picture(document),
    }


def evaluation(verdicts: Verdicts) -> dict[str, Any]:
    """Return accuracies and paired differences as plain data, shares from 0 to 1.

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
    """Return an evaluation with other names of its models."""
    return {
        **document,
        "models": {names[name]: row for name, row in document["models"].items()},
        "differences": [
            row | {key: names[row[key]] for key in ("model", "against")}
            for row in document["differences"]
        ],
    }


def markdown(document: Mapping[str, Any]) -> str:
    """Return the tables of an evaluation, shares in percent and differences in points."""
    models = document["models"]
    base, *others = models
    tasks = list(models[base])
    lines = [
        "Right answers in percent, ± half of the 95 % interval.",
        "",
        *_table(["model", *tasks], [[f"`{n}`", *_shares(models[n], tasks)] for n in models]),
    ]
    for against in [base, *others[:-1]]:
        rows = [row for row in document["differences"] if row["against"] == against]
        if rows:
            shown = [
                [f"`{row['model']}`", *(_points(*row[task]) for task in tasks)] for row in rows
            ]
            lines += ["", f"Against `{against}`, in points, of pairs: the same questions.", ""]
            lines += _table(["model", *tasks], shown)
    return "\n".join(lines)


def _shares(row: Mapping[str, Any], tasks: Sequence[str]) -> list[str]:
    found = [row[task] for task in tasks]
    return [f"{100 * r['accuracy']:.1f} ± {50 * (r['high'] - r['low']):.1f}" for r in found]


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
