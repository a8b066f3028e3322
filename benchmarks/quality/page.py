"""docs/quality-small.md from its words (`page.md`) and the results.

Where the words say `{{methods small bf16}}` stands a table, where they say `{{mean small base}}` a
number: no number of the page is typed by hand.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from resmerge_stream.studies.advice import evidence

from .figures import write_figures
from .groups import RL, SFT
from .regime_page import section
from .results import Group, task_of
from .tables import TABLES, number, percent, points, recovered

_TEMPLATE = Path(__file__).with_name("page.md")
_BLANK = re.compile(r"\{\{([^}]+)\}\}")


def write_page(results: Mapping[str, Any], out: Path) -> None:
    """Write `quality-small.md` and its figures.

    Args:
        results: as `__main__` keeps them.
        out: the folder; the figures go to `images/` in it.
    """
    groups = {name: Group(entry) for name, entry in results["groups"].items()}
    write_figures(groups, out / "images")
    text = fill(_TEMPLATE.read_text("utf-8"), groups, results)
    (out / "quality-small.md").write_text(text, encoding="utf-8")


def fill(text: str, groups: Mapping[str, Group], results: Mapping[str, Any]) -> str:
    """Return words with every `{{…}}` replaced by what it asks for.

    Raises:
        ValueError: a blank asks for something that there is not.
    """

    def value(blank: re.Match[str]) -> str:
        what, *rest = blank[1].split()
        if what == "seed":
            return str(results[what])
        if what == "regimes":
            return section(evidence())
        if what == "again":
            return _again(groups["small"], results["again"])
        if not rest or rest[0] not in groups or what not in (TABLES.keys() | _NUMBERS.keys()):
            raise ValueError(f"page.md asks for {blank[0]}, which is not there.")
        return (TABLES | _NUMBERS)[what](groups[rest[0]], *rest[1:])

    return _BLANK.sub(value, text)


def _mean(group: Group, label: str) -> str:
    return percent(group.mean(label)).partition(" ")[0]


def _gap(group: Group, label: str, other: str) -> str:
    return points(*group.gap(label, other))


def _best(group: Group, output: str) -> str:
    return group.labels(output)[0].partition("|")[0]


def _range_of(
    value: Callable[[Group, str], float],
    form: str,
) -> Callable[[Group, str], str]:
    """Return a function that gives the smallest and the largest value of "rl" or "sft" experts."""

    def shown(group: Group, kind: str) -> str:
        values = sorted(value(group, name) for name in _experts(kind))
        return f"{values[0]:{form}}–{values[-1]:{form}}"

    return shown


def _experts(kind: str) -> Sequence[str]:
    return {"rl": RL, "sft": SFT}[kind]


def _spectrum(key: str) -> Callable[[Group, str], float]:
    def value(group: Group, name: str) -> float:
        return float(next(row[key] for row in group.spectrum if row["name"] == name))

    return value


def _gate(group: Group, kind: str, key: str) -> str:
    row = next(row for row in group.spectrum if row["name"] == "gates")
    return f"{row[f'{kind} {key}']:.3f}"


def _alone(group: Group, kind: str, part: str, output: str) -> str:
    """Return the mean share of the experts' gains that one component keeps, in percent."""
    names = _experts(kind)
    shares = [recovered(group, name, f"{name}:{part}|{output}") for name in names]
    return f"{100 * sum(shares) / len(shares):.0f}"


def _kept(group: Group, label: str) -> str:
    return f"{100 * group.retained(label, SFT if label.startswith('sft') else RL):.0f}"


def _minutes(group: Group) -> str:
    return f"{sum(entry['seconds'] for entry in group.log['models'].values()) / 60:.0f}"


def _again(group: Group, again: Mapping[str, Any]) -> str:
    name = again["expert"]
    task = task_of(name)
    first, second = (100 * group.accuracy(m, task).accuracy for m in (name, f"again:{name}"))
    gap = points(*group.gap(f"again:{name}", name))
    return (
        f"`{name}` trained again from its base with the same seed: "
        f"{100 * again['equal_weights']:.1f} % of the weights equal, "
        f"{second:.1f} % right on its own task (before: {first:.1f} %), "
        f"mean over the tasks {gap} points"
    )


_NUMBERS: dict[str, Callable[..., str]] = {
    "prompts": lambda group: f"{group.prompts:,}",
    "mean": _mean,
    "gap": _gap,
    "best": _best,
    "best-mean": lambda group, output: _mean(group, group.labels(output)[0]),
    "kept": _kept,
    "gain": lambda group, name: points(*group.own_gain(name)),
    "alone": _alone,
    "gate": _gate,
    "minutes": _minutes,
    "length": lambda group, label: number(group.facts[label]["relative_norm"]),
    "gains": _range_of(lambda group, name: 100 * group.own_gain(name)[0], ".0f"),
    "changed": _range_of(lambda group, name: 100 * _spectrum("changed")(group, name), ".0f"),
    "energy-attention": _range_of(_spectrum("attention head_energy"), ".2f"),
    "energy-ffn": _range_of(_spectrum("ffn head_energy"), ".2f"),
}
