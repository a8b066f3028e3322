"""The figures of docs/quality-small.md, as PNG files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from .groups import RL, SFT
from .results import Group
from .studies import BUDGETS, RANKS, SCALES, UNGATED
from .tables import recovered

_BLUE, _ORANGE, _GREY = "#3b6fb6", "#d9822b", "#888888"
# Methods that the picture of lengths names.
_NAMED = ("resmerge", "mean", "ties:paper", "tsv_m", "iso_c", "ram", "star")


def write_figures(groups: Mapping[str, Group], folder: Path) -> None:
    """Write every figure into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, draw, height in (
        ("components", _components, 3.2),
        ("knobs", _knobs, 3.2),
        ("lengths", _lengths, 3.8),
    ):
        figure = Figure(figsize=(9, height), layout="constrained")
        draw(figure, groups)
        figure.savefig(folder / f"quality-{name}.png", dpi=90, metadata={"Software": None})


def _components(figure: Figure, groups: Mapping[str, Group]) -> None:
    axes = figure.subplots(1, len(groups), squeeze=False, sharey=True)[0]
    for ax, (name, group) in zip(axes, groups.items(), strict=True):
        for offset, part, colour in ((-0.2, "head", _ORANGE), (0.2, "residual", _BLUE)):
            heights = [
                100 * recovered(group, expert, f"{expert}:{part}|float32") for expert in (*RL, *SFT)
            ]
            places = [i + offset for i in range(len(heights))]
            ax.bar(places, heights, width=0.38, color=colour, label=f"{part} alone")
        ax.axhline(100, color=_GREY, linewidth=1)
        ax.set_xticks(range(len(RL) + len(SFT)), [*RL, *SFT], rotation=40, ha="right")
        ax.set_title(f"{name}: share of the own gain that is left, %")
    axes[0].legend(loc="lower left")


def _knobs(figure: Figure, groups: Mapping[str, Group]) -> None:
    left, right = figure.subplots(1, 2, sharey=True)
    for (name, group), colour in zip(groups.items(), (_BLUE, _ORANGE), strict=False):
        ranks = [int(method.rpartition("=")[2]) for method in RANKS]
        _curve(left, group, ranks, RANKS, colour, name)
        pairs = sorted([(0.2, "resmerge"), *((float(m.rpartition("=")[2]), m) for m in BUDGETS)])
        _curve(right, group, *_split(pairs), colour, name)
        ungated = [(float(method.rpartition("=")[2]), method) for method in UNGATED]
        _curve(right, group, *_split(ungated), colour, f"{name}, ungated", style="--")
    left.set_xscale("log", base=2)
    right.set_xscale("symlog", linthresh=0.1)
    right.set_xlim(-0.02, 15)
    left.set_title("mean accuracy by rank k, %")
    right.set_title("by budget ρ, %")
    left.legend()
    right.legend(fontsize=7)


def _split(pairs: Any) -> tuple[list[float], list[str]]:
    return [x for x, _ in pairs], [method for _, method in pairs]


def _curve(
    ax: Any, group: Group, x: Any, methods: Any, colour: str, name: str, style: str = "-"
) -> None:
    results = [group.mean(f"{method}|float32") for method in methods]
    means = [100 * result.accuracy for result in results]
    halves = [50 * (result.high - result.low) for result in results]
    look = {"color": colour, "linestyle": style, "marker": "o", "capsize": 2}
    ax.errorbar(x, means, yerr=halves, label=name, **look)


def _lengths(figure: Figure, groups: Mapping[str, Group]) -> None:
    axes = figure.subplots(1, len(groups), squeeze=False)[0]
    for ax, (name, group) in zip(axes, groups.items(), strict=True):
        line = [_point(group, f"{method}|float32") for method in SCALES]
        ax.plot(*zip(*line, strict=True), color=_GREY, marker=".", label="the sum × λ")
        for label in group.labels("bf16"):
            method = label.partition("|")[0]
            if ":" in method or method == "task_arithmetic":
                continue
            x, y = _point(group, label)
            if not 0 < x < 2.5:
                continue
            colour = _ORANGE if method == "resmerge" else _BLUE
            ax.plot(x, y, marker="o", color=colour, linestyle="none", markersize=4)
            if method in _NAMED:
                ax.annotate(method, (x, y), (3, -9), textcoords="offset points", fontsize=8)
        ax.set_xlabel("length of the update, in experts' updates")
        ax.set_title(f"{name}: mean accuracy, %")
        ax.legend()


def _point(group: Group, label: str) -> tuple[float, float]:
    return group.facts[label]["relative_norm"] or 0.0, 100 * group.mean(label).accuracy
