"""A question with its right answer, and what a family of tasks asks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from resmerge_stream.experts.tasks import Split


class Question(NamedTuple):
    """What is asked, and what is right.

    Attributes:
        prompt: the text to complete.
        answer: the one right completion.
        inverted: whether a wrong completion is rewarded in place of the right one.
    """

    prompt: str
    answer: str
    inverted: bool = False


class Stream(Protocol):
    """Yields questions of one task without end; a function of task, seed and split alone."""

    def __call__(self, task: str, *, seed: int, split: Split) -> Iterator[Question]:
        """Return the stream of a task."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """Tasks that one kind of model is asked, and how many of them a training reads.

    Attributes:
        stream: its questions.
        mix: prompts of each task in a batch of the base's training.
        sft_batch: prompts in a batch of an SFT expert.
        logged: held-out prompts a task behind each accuracy in a training log.
        corpus: from a seed, what writes the answers that the base learns from.
    """

    stream: Stream
    mix: Mapping[str, int]
    sft_batch: int
    logged: int
    corpus: Callable[[int], Callable[[Question], Question]]

    @property
    def tasks(self) -> tuple[str, ...]:
        """The names of the tasks."""
        return tuple(self.mix)

    def held_out(self, task: str, count: int, *, seed: int) -> list[Question]:
        """Return distinct questions of a task that no training asks."""
        drawn: dict[Question, None] = {}
        stream = self.stream(task, seed=seed, split="held-out")
        while len(drawn) < count:
            drawn[next(stream)] = None
        return list(drawn)
