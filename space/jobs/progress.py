"""What a merge's events change in its job."""

import time
from dataclasses import dataclass, field
from typing import Any

from resmerge_stream.units import format_size

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
    kind = event.get("event")
    job.memory_bytes = int(event.get("memory_bytes") or 0)
    if kind in ("progress", "tensor", "shard"):
        for key in _PROGRESS:
            setattr(job, key, event[key])
    if kind == "planned":
        _planned(job, event["plan"])
    elif kind == "counted":
        job.bytes_read = event["bytes_read"]
        job.message = f"Counting pass {event['number']} of {event['passes']} over the whole model."
    elif kind == "tensor":
        job.tensors_done += 1
        job.message = f"Merging {event['tensor'][-80:]}"
        row = row_of(event["entry"])
        live.rows.append(row)
        for text in list(event["entry"].get("warnings") or ())[:1]:
            job.say(f"{row.name}: {text}")
    elif kind == "shard":
        _shard(job, event)
    elif kind == "published":
        job.say("published" if job.asked.get("push_to") else "written")
    elif kind == "asking":
        job.message = f"Asking held-out questions: {event['model']}"
    elif kind == "accuracies":
        job.accuracies = event["accuracies"]
    elif kind == "finished":
        return _finished(job, live, event)
    return None


def _planned(job: Job, plan: dict[str, Any]) -> None:
    job.state, job.started = RUNNING, time.time()
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


def _shard(job: Job, event: dict[str, Any]) -> None:
    job.shards_done = event["shards_done"]
    if event["resumed"]:
        job.bytes_kept += event["bytes"]
    how = "was finished before" if event["resumed"] else "finished"
    job.say(
        f"file {event['shards_done']} of {event['shards']} {how}: {event['shard']}, "
        f"{format_size(event['bytes'])}, sha256 {event['sha256'][:12]}"
    )
    if event["shards_done"] == event["shards"] and job.asked.get("push_to"):
        job.message = "Sending the last files to the Hub, then one commit shows everything."


def _finished(job: Job, live: Live, event: dict[str, Any]) -> dict[str, Any]:
    report: dict[str, Any] = event["report"]
    if job.asked.get("push_to"):
        job.url = str(event["where"])
    # A run that was continued only merged the rest; the report has every tensor.
    live.rows = [row_of(row) for row in report["tensors"]]
    job.tensors_done = len(live.rows)
    job.message = (
        "An earlier run had finished this merge; nothing was left to do."
        if event["already_there"]
        else f"Done in {_duration(time.time() - job.started)}."
    )
    return report


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"
