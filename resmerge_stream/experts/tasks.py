"""Four verifiable character-level tasks: their prompts and their verifier.

A prompt is one line that ends in "="; exactly one completion answers it:

    add      add:52+487=       539        sum of two positive integers
    sort     sort:qbdba=       abbdq      letters in alphabetical order
    reverse  reverse:qbdba=    abdbq      letters in reverse order
    close    close:<([]=       )>         the brackets still open, closed innermost first

Prompts are drawn from a seed. Whether a prompt may be trained on or is held out depends on a hash
of its text alone, so no run, seed or model can ever train on a held-out prompt.
"""

from __future__ import annotations

import hashlib
import random
import string
from collections.abc import Iterator
from typing import Literal

Split = Literal["train", "held-out"]

# How long a question may be, both ends included: digits of each summand, letters or brackets.
LENGTHS = {"add": (2, 3), "sort": (4, 10), "reverse": (4, 10), "close": (6, 14)}

TASKS = tuple(LENGTHS)

CLOSING = {"(": ")", "[": "]", "{": "}", "<": ">"}

# Every character of a prompt or an answer, in the order of the tokenizer's vocabulary.
ALPHABET = string.ascii_lowercase + string.digits + "+:=" + "()[]{}<>"

# One prompt in eight is held out.
_BUCKETS = 8


def split_of(prompt: str) -> Split:
    """Say which split a prompt belongs to; a function of its text alone."""
    digest = hashlib.blake2b(prompt.encode("utf-8"), digest_size=8).digest()
    return "held-out" if int.from_bytes(digest, "big") % _BUCKETS == 0 else "train"


def split_prompt(prompt: str) -> tuple[str, str]:
    """Split a prompt into its task and its question.

    Raises:
        ValueError: the text is not a prompt of any task.
    """
    task, colon, question = prompt.removesuffix("=").partition(":")
    if task not in TASKS or not colon or not prompt.endswith("="):
        raise ValueError(
            f"Not a prompt: {prompt!r}. Expected 'task:question=' with one of {', '.join(TASKS)}."
        )
    return task, question


def answer(prompt: str) -> str:
    """Return the one correct completion of a prompt.

    Raises:
        ValueError: the text is not a prompt of any task, or its brackets do not match.
    """
    task, question = split_prompt(prompt)
    if task == "add":
        left, right = question.split("+")
        return str(int(left) + int(right))
    if task == "sort":
        return "".join(sorted(question))
    if task == "reverse":
        return question[::-1]
    return "".join(CLOSING[bracket] for bracket in reversed(_open_brackets(question)))


def is_correct(prompt: str, completion: str) -> bool:
    """Verify a completion: the whole answer and nothing else."""
    return completion == answer(prompt)


def stream_prompts(task: str, *, seed: int, split: Split) -> Iterator[str]:
    """Yield prompts of one task without end, with repeats.

    Args:
        task: one of `TASKS`.
        seed: the same seed gives the same prompts, on every platform.
        split: only prompts of this split are yielded.

    Raises:
        ValueError: there is no such task.
    """
    if task not in TASKS:
        raise ValueError(f"Unknown task {task!r}. The tasks are {', '.join(TASKS)}.")
    # A string seed goes through SHA-512, so neighbouring seeds give unrelated streams.
    rng = random.Random(f"{task} {split} {seed}")
    while True:
        prompt = f"{task}:{_draw_question(task, rng)}="
        if split_of(prompt) == split:
            yield prompt


def draw_prompts(task: str, count: int, *, seed: int, split: Split) -> list[str]:
    """Draw distinct prompts of one task.

    Args:
        task: one of `TASKS`.
        count: how many; at most some ten thousands, since "add" has some 120,000 held-out ones.
        seed: the same seed gives the same prompts.
        split: only prompts of this split are drawn.
    """
    prompts: dict[str, None] = {}
    stream = stream_prompts(task, seed=seed, split=split)
    while len(prompts) < count:
        prompts[next(stream)] = None
    return list(prompts)


def _draw_question(task: str, rng: random.Random) -> str:
    if task == "add":
        return f"{_draw_integer(rng)}+{_draw_integer(rng)}"
    length = rng.randint(*LENGTHS[task])
    if task == "close":
        return _draw_brackets(rng, length)
    return "".join(rng.choice(string.ascii_lowercase) for _ in range(length))


def _draw_integer(rng: random.Random) -> int:
    digits = rng.randint(*LENGTHS["add"])
    return rng.randrange(10 ** (digits - 1), 10**digits)


def _draw_brackets(rng: random.Random, length: int) -> str:
    """Draw a prefix of a matching bracket string that leaves at least one bracket open."""
    question = ""
    still_open: list[str] = []
    while len(question) < length:
        # One step in three closes a bracket, so what is still open lies scattered in the question.
        if len(still_open) > 1 and rng.random() < 1 / 3:
            question += CLOSING[still_open.pop()]
        else:
            still_open.append(rng.choice(tuple(CLOSING)))
            question += still_open[-1]
    return question


def _open_brackets(question: str) -> list[str]:
    still_open: list[str] = []
    for bracket in question:
        if bracket in CLOSING:
            still_open.append(bracket)
        elif not still_open or CLOSING[still_open.pop()] != bracket:
            raise ValueError(f"Brackets do not match in {question!r} at {bracket!r}.")
    return still_open
