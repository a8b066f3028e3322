"""A share of right answers, and the 95 % intervals of such shares and of their differences."""

import math
from collections.abc import Mapping, Sequence
from statistics import NormalDist
from typing import NamedTuple

# Standard normal quantile of a two-sided 95 % interval.
_Z = 1.959964


class Accuracy(NamedTuple):
    """Share of right answers with its 95 % interval.

    Attributes:
        accuracy: right answers among `n`, 0 to 1.
        low: lower end of the interval.
        high: upper end of the interval.
        n: prompts asked.
    """

    accuracy: float
    low: float
    high: float
    n: int


def wilson(right: int, n: int) -> Accuracy:
    """Return a share and its 95 % Wilson score interval."""
    share = right / n
    spread = _Z * math.sqrt(share * (1 - share) / n + _Z**2 / (4 * n**2))
    centre = share + _Z**2 / (2 * n)
    scale = 1 + _Z**2 / n
    return Accuracy(share, (centre - spread) / scale, (centre + spread) / scale, n)


def mean_accuracy(accuracies: Mapping[str, Accuracy]) -> Accuracy:
    """Return the unweighted mean over tasks; its interval is the normal one of a mean of shares."""
    shares = [result.accuracy for result in accuracies.values()]
    mean = sum(shares) / len(shares)
    variance = sum(r.accuracy * (1 - r.accuracy) / r.n for r in accuracies.values())
    half = _Z * math.sqrt(variance) / len(shares)
    return Accuracy(mean, mean - half, mean + half, sum(r.n for r in accuracies.values()))


def paired_difference(
    first: Sequence[Sequence[bool]], second: Sequence[Sequence[bool]]
) -> tuple[float, float]:
    """Return how much more often the first model is right than the second, on the same prompts.

    Args:
        first: for each task, whether the first model answered each prompt rightly.
        second: the same for the second model, prompt by prompt.

    Returns:
        The difference of the means over tasks, and half of its 95 % interval. What both models
        answer alike cancels, so the interval is narrower than those of the two accuracies.
    """
    return _difference(first, second, _Z, pseudo=0)


def adjusted_difference(
    first: Sequence[Sequence[bool]], second: Sequence[Sequence[bool]], risk: float
) -> tuple[float, float]:
    """Return the same with the interval of Agresti and Min (2005), of any risk.

    Each of the four ways in which two models can answer a prompt is seen half a time more, so the
    interval holds its risk for few prompts too. The difference stays that of the prompts.

    Args:
        first: as for `paired_difference`.
        second: likewise.
        risk: that the interval leaves the truth out, 0.05 for one of 95 %.
    """
    difference, _ = _difference(first, second, 0.0, pseudo=0)
    return difference, _difference(first, second, NormalDist().inv_cdf(1 - risk / 2), pseudo=2)[1]


def _difference(
    first: Sequence[Sequence[bool]], second: Sequence[Sequence[bool]], z: float, pseudo: int
) -> tuple[float, float]:
    means, variances = [], []
    for ours, theirs in zip(first, second, strict=True):
        differences = [int(a) - int(b) for a, b in zip(ours, theirs, strict=True)]
        n = len(differences) + pseudo
        mean = sum(differences) / n
        # Of the pseudo prompts half are answered differently, as often one way as the other.
        squares = (sum(d * d for d in differences) + pseudo / 2) / n
        means.append(mean)
        variances.append((squares - mean**2) / n)
    return sum(means) / len(means), z * math.sqrt(sum(variances)) / len(means)
