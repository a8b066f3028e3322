"""What a merge's events change in its job."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from resmerge_stream.run.events import (
    Counted,
    Event,
    Finished,
    Planned,
    Progressed,
    Published,
    ShardFinished,
    TensorMerged,
)
from resmerge_stream.units import format_duration, format_size

from ..remedies import plan_said
from ..rows import Row, row_of
from .records import PLANNING, RUNNING, Job

_PROGRESS = (
    "bytes_read", "bytes_written", "bytes_sent", "read_speed", "write_speed", "sent_speed",
    "seconds_left",
)  # fmt: skip


@dataclass(slots=True)
class Live:
    """What is known of a running job and not worth a record.

    Attributes:
        rows: the tensors so far, for the running picture.
    """

    rows: list[Row] = field(default_factory=list)


def begin(job: Job, live: Live) -> None:
    """Note that a job's process was started."""
    job.state, job.started, job.message = PLANNING, time.time(), "Reading headers and configs."
    job.bytes_read = job.bytes_written = job.bytes_sent = job.bytes_kept = 0
    job.tensors_done = job.shards_done = 0
    live.rows.clear()
    job.say("started: reading headers and configs")


def apply(job: Job, live: Live, event: dict[str, Any]) -> dict[str, Any] | None:
    """Take an event, as the worker prints it, into the job; return the report of the last one."""
    job.memory_bytes = int(event.get("memory_bytes") or 0)
    told = Event.from_dict(event)
    if isinstance(told, Progressed):
        for key in _PROGRESS:
            setattr(job, key, getattr(told, key))
    if isinstance(told, Planned):
        _planned(job, told.plan)
    elif isinstance(told, Counted):
        job.bytes_read = told.bytes_read
        job.message = f"Counting pass {told.number} of {told.passes} over the whole model."
    elif isinstance(told, TensorMerged):
        job.tensors_done += 1
        job.message = f"Merging {told.tensor[-80:]}"
        row = row_of(told.entry)
        live.rows.append(row)
        for text in list(told.entry.get("warnings") or ())[:1]:
            job.say(f"{row.name}: {text}")
    elif isinstance(told, ShardFinished):
        _shard(job, told)
    elif isinstance(told, Published):
        job.say("published" if job.asked.get("push_to") else "written")
    elif isinstance(told, Finished):
        return _finished(job, live, told)
    elif event.get("event") == "asking":
        job.message = f"Asking {event['model']}"
    elif event.get("event") == "accuracies":
        job.accuracies = event["accuracies"]
    elif event.get("event") == "chosen":
        job.choice = str(event["choice"])
    elif event.get("event") == "unasked":
        job.say(f"not asked: {event['message']}")
        job.unasked = str(event["message"])
    return None


def _planned(job: Job, plan: Mapping[str, Any]) -> None:
    job.state = RUNNING
    job.message = "Merging."
    job.plan = {
        "tensors": plan["tensors"],
        "shards": len(plan["shards"]),
        "read_bytes": plan["read_bytes"],
        "write_bytes": plan["write_bytes"],
        "peak_memory_bytes": plan["peak_memory_bytes"],
        "seconds_estimate": plan["seconds_estimate"],
    }
    for warning in plan_said(plan)["warnings"]:
        job.say(f"note: {warning}")
    job.say(
        f"planned: {plan['tensors']} tensors into {len(plan['shards'])} file(s), "
        f"{format_size(plan['read_bytes'])} to read, {format_size(plan['write_bytes'])} to write"
    )


def _shard(job: Job, event: ShardFinished) -> None:
    job.shards_done = event.shards_done
    if event.resumed:
        job.bytes_kept += event.bytes
    how = "was finished before" if event.resumed else "finished"
    job.say(
        f"file {event.shards_done} of {event.shards} {how}: {event.shard}, "
        f"{format_size(event.bytes)}, sha256 {event.sha256[:12]}"
    )
    if event.shards_done == event.shards and job.asked.get("push_to"):
        job.message = "Sending the last files to the Hub, then one commit shows everything."


def _finished(job: Job, live: Live, event: Finished) -> dict[str, Any] | None:
    if job.asked.get("push_to"):
        job.url = event.where
    if job.asked.get("methods"):  # a comparison leaves scores, and no model
        job.took = time.time() - job.started
        return None
    # A run that was continued only merged the rest; the report has every tensor.
    live.rows = [row_of(row) for row in event.report["tensors"]]
    job.tensors_done = len(live.rows)
    job.took = 0.0 if event.already_there else time.time() - job.started
    job.message = "Everything is written."
    return dict(event.report)


def done_in_words(job: Job, event: Mapping[str, Any]) -> str:
    """Return how long a finished job took, by its last event."""
    if job.asked.get("methods"):
        return f"Done in {format_duration(job.took)}."
    if event["already_there"]:
        return "An earlier run had finished this merge; nothing was left to do."
    return (
        f"Done in {format_duration(job.took)}, from the first header to the last file; of that, "
        f"merging took {format_duration(event['report']['summary']['seconds'])}."
    )
