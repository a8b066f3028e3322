"""Which of several merges is best, by one half of the questions, and how it does on the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any, Literal

from ..experts.accuracy import adjusted_difference, mean_accuracy, paired_difference, wilson
from .results import Verdicts, evaluation

# Of an error in any pair of candidates.
_RISK = 0.05

AtLeast = Literal["base", "experts"]
AT_LEAST: tuple[AtLeast, ...] = ("base", "experts")


def choose(choosing: Verdicts, candidates: Sequence[str]) -> dict[str, Any]:
    """Return the candidate that answers most, as a mean over tasks; the first of equals.

    It is set apart from another one only where the interval of their difference leaves zero out.
    All pairs of candidates share a risk of 5 %, by Bonferroni's inequality, since each pair could
    have been the one that is looked at; and each interval is that of Agresti and Min (2005,
    https://doi.org/10.1002/sim.1781), which stays honest for few questions.

    Args:
        choosing: every model's verdicts on the questions that choose; the first is the base.
        candidates: which of the models are to be chosen from.

    Returns:
        ``best``; ``against``, by other candidate the best's lead and half of its interval;
        ``evaluation`` of the questions that chose.
    """
    found = evaluation(choosing)
    best = max(candidates, key=lambda label: float(found["models"][label]["mean"]["accuracy"]))
    pairs = max(len(list(combinations(candidates, 2))), 1)
    against = {
        label: list(
            adjusted_difference(
                list(choosing[best].values()), list(choosing[label].values()), _RISK / pairs
            )
        )
        for label in candidates
        if label != best
    }
    return {"best": best, "against": against, "evaluation": found}


def reported(chosen: Mapping[str, Any], reporting: Verdicts, kept: str) -> dict[str, Any]:
    """Return a choice with how the best does on the questions that did not choose it.

    Args:
        chosen: from `choose`.
        reporting: verdicts of the base, the experts and the best on those questions, in this order.
        kept: which models are kept: ``best``, ``all`` or ``none``.

    Returns:
        The choice, with ``base``, ``kept``, ``score``, a share, how many were ``asked``, and
        ``below``: by the name of each model that answers more, the best's lead (negative) and half
        of its 95 % interval.
    """
    best, base = chosen["best"], next(iter(reporting))
    own = list(reporting[best].values())
    below = {}
    for name, verdicts in reporting.items():
        difference, half = paired_difference(own, list(verdicts.values()))
        if name != best and difference < 0:
            below[name] = [difference, half]
    score = mean_accuracy({t: wilson(sum(b), len(b)) for t, b in reporting[best].items()})
    how_well = {"score": score.accuracy, "asked": score.n, "below": below}
    return {**chosen, "base": base, "kept": kept, **how_well}


def falls_short(choice: Mapping[str, Any], at_least: AtLeast) -> bool:
    """Return whether the best is below the base, or below any model that was asked."""
    below = choice["below"]
    return bool(below) if at_least == "experts" else choice["base"] in below
