"""The answers of all models read as accuracies, differences and retained gains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from resmerge_stream.experts.accuracy import Accuracy, mean_accuracy, paired_difference, wilson
from resmerge_stream.experts.tasks import TASKS


class Group:
    """One group's results.

    Args:
        entry: its part of ``results.json``, as `__main__` writes it.
    """

    def __init__(self, entry: Mapping[str, Any]) -> None:
        self.answers: Mapping[str, Mapping[str, str]] = entry["answers"]
        self.facts: Mapping[str, Mapping[str, Any]] = entry["facts"]
        self.log: Mapping[str, Any] = entry["log"]
        self.prompts: int = entry["prompts"]
        self.spectrum: Sequence[Mapping[str, Any]] = entry["spectrum"]

    def accuracy(self, label: str, task: str) -> Accuracy:
        """Return a model's accuracy on a task."""
        bits = self.answers[label][task]
        return wilson(bits.count("1"), len(bits))

    def mean(self, label: str, tasks: Sequence[str] = TASKS) -> Accuracy:
        """Return a model's mean accuracy over tasks."""
        return mean_accuracy({task: self.accuracy(label, task) for task in tasks})

    def gap(self, label: str, other: str, tasks: Sequence[str] = TASKS) -> tuple[float, float]:
        """Return by how much the first model's mean is above the second's, and half the interval.

        Both were asked the same prompts, so the difference is one of pairs.
        """
        first, second = (
            [[bit == "1" for bit in self.answers[name][task]] for task in tasks]
            for name in (label, other)
        )
        return paired_difference(first, second)

    def own_gain(self, expert: str) -> tuple[float, float]:
        """Return what an expert gained on its own task over the base, and half the interval."""
        return self.gap(expert, "base", (task_of(expert),))

    def retained(self, label: str, experts: Sequence[str]) -> float:
        """Return how much of the experts' own gains a merge of them kept; 1 is all."""
        tasks = [task_of(expert) for expert in experts]
        gained = sum(self.own_gain(expert)[0] for expert in experts)
        return sum(self.gap(label, "base", (task,))[0] for task in tasks) / gained

    def labels(self, output: str, *, prefix: str = "") -> list[str]:
        """Return the labels of merges of this output whose set of experts is `prefix`, best first.

        A prefix ends in a colon; none stands for all RL experts.
        """
        sets = ("sft:", "top-", "same-length", *(f"{task}+" for task in TASKS), "rl-", "sft-")
        found = [
            label
            for label in self.answers
            if label.endswith(f"|{output}")
            and (label.startswith(prefix) if prefix else not label.startswith(sets))
        ]
        return sorted(found, key=lambda label: -self.mean(label).accuracy)


def task_of(expert: str) -> str:
    """Return an expert's own task: "rl-add" was trained on "add"."""
    return expert.rpartition(":")[2].partition("-")[2]
