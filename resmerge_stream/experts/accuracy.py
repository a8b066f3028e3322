"""A share of right answers, and the 95 % intervals of such shares and of their differences."""

import math
from collections.abc import Mapping, Sequence
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
    means, variances = [], []
    for ours, theirs in zip(first, second, strict=True):
        differences = [int(a) - int(b) for a, b in zip(ours, theirs, strict=True)]
        mean = sum(differences) / len(differences)
        squares = sum(d * d for d in differences) / len(differences)
        means.append(mean)
        variances.append((squares - mean**2) / len(differences))
    return sum(means) / len(means), _Z * math.sqrt(sum(variances)) / len(means)
