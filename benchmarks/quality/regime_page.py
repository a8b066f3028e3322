"""The tables that are made of the evidence that the advice goes by.

"Regimes" of docs/quality-small.md, and the real model's of docs/quality.md.
"""

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
STUDENT = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}


def write_between(page: Path, mark: str, text: str) -> None:
    """Put tables between the marks of a page: `<!-- MARK -->` and `<!-- end of MARK -->`."""
    before, start, rest = page.read_text("utf-8").partition(f"<!-- {mark} -->\n")
    _, end, after = rest.partition(f"<!-- end of {mark} -->")
    page.write_text(f"{before}{start}{text}{end}{after}", encoding="utf-8")


def real_models(evidence: Mapping[str, Any]) -> str:
    """Return a real model's tables.

    They are: all RL experts by every method, the other cases by those that all cases have, and
    heads and residuals alone.
    """
    real = [case for case in evidence["cases"] if case["model"]]
    whole = [case for case in real if case["case"] == "rl"]
    others = [case for case in real if case["case"] != "rl"]
    found = [_whole(case) for case in whole]
    if others:
        rows = [
            [
                case["regime"],
                f"{case['base']:.0f}",
                f"{statistics.mean(case['tasks']['experts'].values()):.0f}",
                *(_accuracy(case, method) for method in METHODS),
            ]
            for case in others
        ]
        head = ["experts", "base", "each expert on its own", *(f"`{name}`" for name in METHODS)]
        found.append(
            f"Other experts, {others[0]['prompts']} held-out prompts a task, right in percent, the "
            f"best method bold:\n\n{table(head, rows)}\n"
        )
    rows = [
        [
            f"`{one['expert']}`",
            *(f"{one['right'][part]:.0f}" for part in ("base", "expert", "head", "residual")),
            *("{:+.0f} ± {:.0f}".format(*one["points"][part]) for part in one["points"]),
        ]
        for one in evidence["parts"]
    ]
    if rows:
        head = ["expert, on its own task", "base", "expert", "head alone", "residual alone"]
        head += ["expert − base", "head − base", "residual − base"]
        found.append(f"An expert's head and residual, each alone:\n\n{table(head, rows)}\n")
    return "\n".join(found)


def _whole(case: Mapping[str, Any]) -> str:
    """Return every method's row of a real model's case, best first."""
    tasks = case["tasks"]
    means = {name: statistics.mean(shares.values()) for name, shares in tasks.items()}
    told = {"base": "base", "experts": "*each expert on its own task*"}
    rows = []
    for name in sorted(means, key=lambda name: -means[name]):
        cells = [*(f"{share:.0f}" for share in tasks[name].values()), f"{means[name]:.1f}"]
        gap = _difference(case, name) if name in case["points"] else ""
        read = case["text"].get(name)
        reads = [f"{read['perplexity']:.1f}", f"{100 * read['kept']:.0f}"] if read else ["", ""]
        rows.append([told.get(name, f"`{name}`"), *cells, gap, *reads])
    head = ["merge", *next(iter(tasks.values())), "mean", f"points from `{case['best']}`"]
    head += ["perplexity", "kept"]
    return (
        f"{case['model']} (`{case['group']}`), {case['regime']}, {case['prompts']} held-out "
        f"prompts a task, right in percent:\n\n{table(head, rows)}\n"
    )


def section(evidence: Mapping[str, Any]) -> str:
    """Return the tables as Markdown: one of accuracies, one of paired differences."""
    cases: Sequence[Mapping[str, Any]] = [c for c in evidence["cases"] if not c["model"]]
    prompts = " or ".join(sorted({str(case["prompts"]) for case in cases}))
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
        f"Right answers in percent, {prompts} prompts a task, the best method bold:\n\n"
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
    half = STUDENT[len(leads)] * statistics.stdev(leads) / len(leads) ** 0.5
    return f"{statistics.mean(leads):+.1f} ± {half:.1f}"


def _accuracy(case: Mapping[str, Any], method: str) -> str:
    text = f"{case['accuracy'][method]:.1f}"
    return f"**{text}**" if method == case["best"] else text


def _difference(case: Mapping[str, Any], method: str) -> str:
    if method == case["best"]:
        return "–"
    difference, half = case["points"][method]
    return f"{difference:+.1f} ± {half:.1f}"
