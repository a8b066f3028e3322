"""The section "Regimes" of docs/quality.md, from the evidence that the advice goes by."""

from __future__ import annotations

import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .regimes import METHODS
from .tables import table

# Bases of one kind, one for each seed.
_SEED = re.compile(r"narrow-\d+")
_BESIDE_THE_MEAN = tuple(method for method in METHODS if method != "mean")
# The 97.5 % point of Student's t for so many values, one degree of freedom less.
_STUDENT = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}
_BETWEEN = re.compile(r"(?<=<!-- regimes -->\n).*?(?=<!-- end of regimes -->)", re.DOTALL)


def write_section(page: Path, evidence: Mapping[str, Any]) -> None:
    """Put the tables between the marks of a page."""
    text = page.read_text("utf-8")
    page.write_text(_BETWEEN.sub(lambda _: section(evidence), text), encoding="utf-8")


def section(evidence: Mapping[str, Any]) -> str:
    """Return the tables as Markdown: one of accuracies, one of paired differences."""
    cases: Sequence[Mapping[str, Any]] = evidence["cases"]
    names = [
        f"{case['group']}, {case['case'] if case['regime'] == 'two tasks' else case['regime']}"
        for case in cases
    ]
    accuracies = [
        [name, f"{case['base']:.1f}", *(_accuracy(case, method) for method in METHODS)]
        for name, case in zip(names, cases, strict=True)
    ]
    differences = [
        [name, f"`{case['best']}`", *(_difference(case, method) for method in METHODS)]
        for name, case in zip(names, cases, strict=True)
    ]
    methods = [f"`{method}`" for method in METHODS]
    return (
        f"Right answers in percent, {evidence['prompts']} prompts a task, the best method bold:\n\n"
        f"{table(['experts', 'base', *methods], accuracies)}\n\n"
        "Points from the best method of the row, paired, ± half of the 95 % interval:\n\n"
        f"{table(['experts', 'best', *methods], differences)}\n{_seeds(cases)}"
    )


def _seeds(cases: Sequence[Mapping[str, Any]]) -> str:
    """Return the table over bases that differ in their seed only; nothing where there is one."""
    by_group: dict[str, dict[str, list[Mapping[str, Any]]]] = {}
    for case in cases:
        if _SEED.fullmatch(case["group"]):
            by_group.setdefault(case["group"], {}).setdefault(case["regime"], []).append(case)
    if len(by_group) < 2:
        return ""
    regimes = [r for r in next(iter(by_group.values())) if all(r in g for g in by_group.values())]
    rows = [
        [regime, *(_over_seeds(by_group, regime, method) for method in _BESIDE_THE_MEAN)]
        for regime in regimes
    ]
    head = ["experts", *(f"`{method}`" for method in _BESIDE_THE_MEAN)]
    return (
        f"\nPoints above the mean of the task vectors, on average over {len(by_group)} fresh bases "
        f"({', '.join(by_group)}), ± half of the 95 % interval over bases (Student's t; the six "
        f"pairs of a base count as one):\n\n{table(head, rows)}\n"
    )


def _over_seeds(
    by_group: Mapping[str, Mapping[str, Sequence[Mapping[str, Any]]]], regime: str, method: str
) -> str:
    leads = [
        statistics.mean(
            case["accuracy"][method] - case["accuracy"]["mean"] for case in found[regime]
        )
        for found in by_group.values()
    ]
    half = _STUDENT[len(leads)] * statistics.stdev(leads) / len(leads) ** 0.5
    return f"{statistics.mean(leads):+.1f} ± {half:.1f}"


def _accuracy(case: Mapping[str, Any], method: str) -> str:
    text = f"{case['accuracy'][method]:.1f}"
    return f"**{text}**" if method == case["best"] else text


def _difference(case: Mapping[str, Any], method: str) -> str:
    if method == case["best"]:
        return "–"
    difference, half = case["points"][method]
    return f"{difference:+.1f} ± {half:.1f}"
