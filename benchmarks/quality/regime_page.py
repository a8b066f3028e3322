"""The section "Regimes" of docs/quality.md, from the evidence that the advice goes by."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .regimes import METHODS
from .tables import table

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
        f"{table(['experts', 'best', *methods], differences)}\n"
    )


def _accuracy(case: Mapping[str, Any], method: str) -> str:
    text = f"{case['accuracy'][method]:.1f}"
    return f"**{text}**" if method == case["best"] else text


def _difference(case: Mapping[str, Any], method: str) -> str:
    if method == case["best"]:
        return "–"
    difference, half = case["points"][method]
    return f"{difference:+.1f} ± {half:.1f}"
