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
        plan = told.plan
        job.state, job.message = RUNNING, "Merging."
        kept = (
            "tensors", "read_bytes", "write_bytes", "peak_memory_bytes", "seconds_estimate",
        )  # fmt: skip
        job.plan = {**{key: plan[key] for key in kept}, "shards": len(plan["shards"])}
        for warning in plan_said(plan)["warnings"]:
            job.say(f"note: {warning}")
        job.say(
            f"planned: {plan['tensors']} tensors into {len(plan['shards'])} file(s), "
            f"{format_size(plan['read_bytes'])} to read, "
            f"{format_size(plan['write_bytes'])} to write"
        )
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
        job.shards_done = told.shards_done
        job.bytes_kept += told.bytes if told.resumed else 0
        how = "was finished before" if told.resumed else "finished"
        job.say(
            f"file {told.shards_done} of {told.shards} {how}: {told.shard}, "
            f"{format_size(told.bytes)}, sha256 {told.sha256[:12]}"
        )
        if told.shards_done == told.shards and job.asked.get("push_to"):
            job.message = "Sending the last files to the Hub, then one commit shows everything."
    elif isinstance(told, Published):
        job.say("published" if job.asked.get("push_to") else "written")
    elif isinstance(told, Finished):
        if job.asked.get("push_to"):
            job.url = told.where
        job.took = time.time() - job.started
        if job.asked.get("methods"):  # a comparison leaves scores, and no model
            return None
        if told.already_there:
            job.took = 0.0
        # A run that was continued only merged the rest; the report has every tensor.
        live.rows = [row_of(row) for row in told.report["tensors"]]
        job.tensors_done = len(live.rows)
        job.message = "Everything is written."
        return dict(told.report)
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
