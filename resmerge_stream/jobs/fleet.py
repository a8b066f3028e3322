"""Several Jobs that run one merge: all of them start or none, and they end with the first.

They are a network group of the Hub. The first is the main process of the run (`run/group.py`), at
which the others find each other; it alone tells what happens.
"""

import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from ..errors import JobRefusedError, PublishError, ResMergeError, StoppedError, listed

if TYPE_CHECKING:
    from ..hub.jobs import HubJobs, JobInfo

# Labels of a Job that is one of several: of which, and its number of how many, from 0.
_FLEET, _NUMBER = "resmerge-fleet", "resmerge-machine"
_PORT = 29500
# Where the first is found by the others: what `run.group.launched` reads. For this one command,
# as a model that is asked later in the same Job would take them for its own.
_JOINED = (
    "RANK={number} WORLD_SIZE={count} LOCAL_RANK=0 LOCAL_WORLD_SIZE=1 "
    'MASTER_ADDR="${{HF_NETWORK_GROUP_PREFIX}}machine0" MASTER_PORT={port} '
)
# How long Jobs whose first is done may take to end by themselves.
_LEAVE_S, _POLL_S = 60.0, 2.0


def start_fleet(
    hub: "HubJobs",
    script: str,
    words: Sequence[str],
    count: int,
    *,
    labels: Mapping[str, str],
    **how: Any,
) -> str:
    """Start Jobs that run one command together, and return the id of the first.

    Args:
        hub: the Jobs of the namespace that pays.
        script: of the shell, which runs the words.
        words: the command.
        count: how many Jobs.
        labels: that tell them from others.
        how: what else `HubJobs.start` takes, the same for all.

    Raises:
        ResMergeError: one could not be started; those that were are cancelled.
    """
    group, started = f"resmerge-{uuid.uuid4().hex[:16]}", list[str]()
    try:
        for number in range(count):
            joined = _JOINED.format(number=number, count=count, port=_PORT)
            job = hub.start(
                ["sh", "-c", joined + script, "sh", *words],
                labels={**labels, _FLEET: group, _NUMBER: f"{number}-of-{count}"},
                network=(group, f"machine{number}"),
                **how,
            )
            started.append(job)
    except BaseException as exc:
        with suppress(ResMergeError):  # also one whose start was not answered
            started += [job.id for job in hub.alive({_FLEET: group}) if job.id not in started]
        left = hub.cancel(started)
        if not isinstance(exc, JobRefusedError | PublishError | StoppedError):
            raise
        told = f"machine {number + 1} of {count} could not be started: {exc}"
        if started and not left:
            told += " Those that were started are cancelled."
        for job in left:
            told += f" One may still run and cost money: hf jobs cancel {hub.namespace}/{job}"
        raise type(exc)(told) from exc
    return started[0]


def running(
    hub: "HubJobs", labels: Mapping[str, str], say: Callable[[str], None] = lambda text: None
) -> str | None:
    """Return the id of the Job to follow among those with these labels that run, or None.

    Of several that run together this is the first. Where it is gone, the others end.

    Args:
        hub: the Jobs of a namespace.
        labels: of the merge.
        say: told what was cancelled.
    """
    alive = hub.alive(labels)
    first = [job for job in alive if _number(job) == 0]
    fleets = {_fleet(job) for job in first}
    _cancel(hub, [job.id for job in alive if _fleet(job) and _fleet(job) not in fleets], say)
    newest = max(first, key=lambda job: str(job.created_at), default=None)
    return newest.id if newest is not None else None


def end_others(hub: "HubJobs", first: "JobInfo", say: Callable[[str], None]) -> None:
    """Have the others end when the first has: what they would wait for does not come.

    Args:
        hub: the Jobs of a namespace.
        first: a Job that has ended; nothing is done where it was alone.
        say: told what was cancelled.
    """
    if not _fleet(first) or _number(first):
        return
    until = time.monotonic() + (_LEAVE_S if first.status.stage == "COMPLETED" else 0.0)
    while others := [job.id for job in hub.alive({_FLEET: _fleet(first)})]:
        if time.monotonic() >= until:
            _cancel(hub, others, say)
            return
        time.sleep(_POLL_S)


def machines_of(job: "JobInfo") -> int:
    """Return how many Jobs run together with one, itself among them."""
    count = (job.labels or {}).get(_NUMBER, "").rpartition("-of-")[2]
    return int(count) if count.isdecimal() else 1


def _cancel(hub: "HubJobs", jobs: Sequence[str], say: Callable[[str], None]) -> None:
    if not jobs:
        return
    left = hub.cancel(jobs)
    done = [job for job in jobs if job not in left]
    if done:
        say(f"cancelled, as the first machine of their run has ended: {listed(done)}.")
    for job in left:
        say(f"warning: may still run and cost money: hf jobs cancel {hub.namespace}/{job}")


def _fleet(job: "JobInfo") -> str:
    return str((job.labels or {}).get(_FLEET, ""))


def _number(job: "JobInfo") -> int:
    number = (job.labels or {}).get(_NUMBER, "").partition("-of-")[0]
    return int(number) if number.isdecimal() else 0
