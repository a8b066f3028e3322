"""A part of a merge: which shards one of several runs makes that cannot reach each other.

What array jobs are made of: each run knows its number and how many there are, nothing else. Which
shards are whose follows from the plan alone, so that any of them may run again, late or twice.
"""

import heapq
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..errors import RecipeError, shown

_NUMBERS = re.compile(r"(\d{1,6})/(\d{1,6})", re.ASCII)
_AUTO = re.compile(r"auto(?:/(\d{1,6}))?", re.ASCII)
_FINISH = "finish"


@dataclass(frozen=True, slots=True)
class Part:
    """One run of several over the same plan.

    Attributes:
        number: which, from 0; None for the run that merges nothing and publishes what all made.
        count: how many there are; 0 where `number` is None.
    """

    number: int | None
    count: int

    def __post_init__(self) -> None:
        if self.number is not None and self.number >= self.count:
            raise RecipeError(
                f"there is no part {self.number} of {self.count}: the parts are 0 to "
                f"{self.count - 1}.",
                field="part",
            )

    def __str__(self) -> str:
        return _FINISH if self.number is None else f"{self.number}/{self.count}"

    @classmethod
    def parsed(cls, key: str, value: object) -> "Part":
        """Return the part that a user named: ``1/4``, ``auto``, ``auto/4`` or ``finish``.

        Raises:
            RecipeError: it is none of these, or no scheduler says which part this is.
        """
        if isinstance(value, Part):
            return value
        text = value.strip() if isinstance(value, str) else ""
        if text == _FINISH:
            return cls(None, 0)
        if numbers := _NUMBERS.fullmatch(text):
            return cls(int(numbers[1]), int(numbers[2]))
        if auto := _AUTO.fullmatch(text):
            return _of_scheduler(os.environ, int(auto[1]) if auto[1] else None)
        raise RecipeError(
            f"{key} must be the part's number from 0 and how many there are, such as 0/4, or "
            f"auto, not {shown(value)}.",
            field=key,
        )


def _of_scheduler(env: Mapping[str, str], count: int | None) -> Part:
    """Return the part that a scheduler's environment tells of.

    Args:
        env: the environment.
        count: how many parts there are, where the user says so; then a task's number is its part's.
    """
    if "SLURM_ARRAY_TASK_ID" in env:
        number = _whole(env, "SLURM_ARRAY_TASK_ID")
        if count is not None:
            return Part(number, count)
        first, last, step, tasks = (
            _whole(env, f"SLURM_ARRAY_TASK_{what}") for what in ("MIN", "MAX", "STEP", "COUNT")
        )
        if not step or (last - first) // step + 1 != tasks or (number - first) % step:
            raise RecipeError(
                f"this array has {tasks} tasks from {first} to {last}, which are not evenly "
                "spaced, so they do not say how many parts there are. Write auto/N.",
                field="part",
            )
        return Part((number - first) // step, tasks)
    if "JOB_COMPLETION_INDEX" in env:  # an indexed Job of Kubernetes
        if count is None:  # which does not say of how many
            raise RecipeError(
                "Kubernetes tells a Job's pod its number, but not how many there are: write "
                "auto/N, with N as in the Job's completions.",
                field="part",
            )
        return Part(_whole(env, "JOB_COMPLETION_INDEX"), count)
    # Only srun sets the second one; the script of a batch has a SLURM_PROCID too, always 0.
    if "SLURM_PROCID" in env and "SLURM_STEP_NUM_TASKS" in env:
        return Part(_whole(env, "SLURM_PROCID"), count or _whole(env, "SLURM_STEP_NUM_TASKS"))
    raise RecipeError(
        "no scheduler says which part this is: SLURM_ARRAY_TASK_ID, JOB_COMPLETION_INDEX and, "
        "under srun, SLURM_PROCID are not set. Write the number, such as 0/4.",
        field="part",
    )


def _whole(env: Mapping[str, str], name: str) -> int:
    value = env.get(name, "")
    if not (value.isascii() and value.isdigit()):
        raise RecipeError(f"{name} must be a whole number, not {shown(value)}.", field="part")
    return int(value)


def shares(seconds: Sequence[float], count: int) -> list[int]:
    """Return which part makes each shard: the longest first, each to who has the least by then.

    Args:
        seconds: estimated, of each shard.
        count: how many parts there are.
    """
    # In whole numbers: sums must not depend on the machine.
    costs = [max(round(1e6 * one), 1) for one in seconds]
    loads = [(0, part) for part in range(count)]
    found = [0] * len(costs)
    for shard in sorted(range(len(costs)), key=lambda n: (-costs[n], n)):
        load, part = heapq.heappop(loads)
        found[shard] = part
        heapq.heappush(loads, (load + costs[shard], part))
    return found
