"""What the base learns from: a corpus whose writers slip, the more often the longer the question.

Real pretraining data mixes right answers with wrong ones. So does this corpus, and on purpose: the
base learns each task's right answer and its usual slip, and says either. Reinforcement then has
something to select, and does so with small changes of the weights.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from resmerge_stream.experts.tasks import LENGTHS, answer, split_prompt

from .questions import Question

# Answers a question, rightly or not.
Writer = Callable[[Question], Question]


@dataclass(frozen=True, kw_only=True, slots=True)
class SlipRates:
    """How often the corpus is wrong.

    Attributes:
        shortest: share of slips among the shortest questions of a task, 0 to 1.
        longest: the same among the longest; in between it grows linearly with the length.
    """

    shortest: float
    longest: float


def slip(prompt: str) -> str:
    """Return the usual slip for a prompt; now and then it happens to be right.

    add: nothing is carried. sort: alphabet backwards. reverse: copied. close: outermost first.
    """
    task, question = split_prompt(prompt)
    if task != "add":
        return answer(prompt)[::-1]
    left, right = question.split("+")
    width = max(len(left), len(right))
    columns = zip(left.zfill(width), right.zfill(width), strict=True)
    return str(int("".join(str((int(a) + int(b)) % 10) for a, b in columns)))


def hardness(prompt: str) -> float:
    """Return where a question's length lies among those of its task, from 0 to 1."""
    task, question = split_prompt(prompt)
    shortest, longest = LENGTHS[task]
    if task == "add":
        shortest, longest = 2 * shortest + 1, 2 * longest + 1
    return (len(question) - shortest) / (longest - shortest)


def slipping_writer(rates: SlipRates, *, seed: int) -> Writer:
    """Return a writer who answers rightly or slips, at random from a seed."""
    rng = random.Random(f"slips {seed}")

    def write(question: Question) -> Question:
        prompt = question.prompt
        rate = rates.shortest + (rates.longest - rates.shortest) * hardness(prompt)
        return Question(prompt, slip(prompt)) if rng.random() < rate else question

    return write
