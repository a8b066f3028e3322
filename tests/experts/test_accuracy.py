"""Intervals against numbers worked out by hand, and against chance itself."""

import random

import pytest

from resmerge_stream.experts.accuracy import Accuracy, mean_accuracy, paired_difference, wilson


@pytest.mark.parametrize(
    ("right", "n", "low", "high"),
    [(8, 10, 0.4902, 0.9433), (0, 20, 0.0, 0.1611), (20, 20, 0.8389, 1.0)],
)
def test_wilson_gives_the_published_intervals(right, n, low, high):
    """The interval is Wilson's score interval, within 0 and 1 even at the ends."""
    found = wilson(right, n)

    assert found == pytest.approx(Accuracy(right / n, low, high, n), abs=1e-4)


def test_wilson_holds_the_truth_95_times_of_100():
    """Of intervals around drawn shares, about 95 % hold the share they were drawn from."""
    rng = random.Random(0)
    found = [wilson(sum(rng.random() < 0.3 for _ in range(200)), 200) for _ in range(1000)]

    assert 930 <= sum(result.low <= 0.3 <= result.high for result in found) <= 970


def test_the_mean_of_tasks_has_the_interval_of_a_mean():
    """Two tasks of share one half and 100 prompts: the standard error is 0.05 / √2."""
    found = mean_accuracy({"a": wilson(50, 100), "b": wilson(50, 100)})

    assert found.accuracy == 0.5
    assert found.high - found.accuracy == pytest.approx(1.96 * 0.05 / 2**0.5, abs=1e-4)
    assert found.n == 200


def test_what_both_models_answer_alike_cancels():
    """A paired difference counts only prompts that the two models answer differently."""
    first = [[True] * 90 + [True] * 6 + [False] * 4]
    second = [[True] * 90 + [False] * 6 + [True] * 4]

    difference, half = paired_difference(first, second)

    assert difference == pytest.approx(0.02)
    assert half == pytest.approx(1.96 * ((0.1 - 0.02**2) / 100) ** 0.5, abs=1e-4)
    assert paired_difference(first, first) == (0.0, 0.0)
