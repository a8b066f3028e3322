"""Paired differences of accuracies, with their intervals."""

import math
from collections.abc import Sequence

# Of a normal distribution: 95 % lie within so many standard errors.
_Z = 1.959964


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
