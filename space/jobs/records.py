"""A job as it is remembered: what was asked, how far it is, what it said; never a token."""

import json
import re
import secrets
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from resmerge_stream.documents import load_json
from resmerge_stream.sinks.durable import write_durably

JOB_ID = re.compile(r"[A-Za-z0-9_-]{43}")
QUEUED, PLANNING, RUNNING = "queued", "planning", "running"
CANCELLED, FAILED, RESUMABLE, DONE = "cancelled", "failed", "resumable", "done"
ACTIVE = frozenset({QUEUED, PLANNING, RUNNING})
# States from which the same job can go on.
CONTINUABLE = frozenset({CANCELLED, RESUMABLE})
_LOG_LINES = 300


@dataclass(slots=True)
class Job:
    """One merge and its history.

    Attributes:
        id: 256 random bits; who knows it may watch an anonymous job.
        owner: the account's name; empty for a job without an account.
        key: SHA-256 of the browser's secret that an anonymous job was started with; empty for one
            started by a program, which its id alone controls.
        asked: as `Request.to_dict`.
        state: one of the states above.
        created, updated: seconds since 1970.
        message: one sentence about the state.
        url: of the published model.
        plan: totals of the plan: tensors, shards, bytes, memory.
        bytes_read, bytes_written, bytes_sent: of this run.
        bytes_kept: finished by earlier runs.
        tensors_done, shards_done: so far.
        started, took: when its last run began, and how many seconds it took if that finished it.
        read_speed, write_speed, sent_speed: bytes a second, over the last moments.
        seconds_left: until everything is merged and sent, where that can be told.
        memory_bytes: private memory of the merge now.
        accuracies: of the models that were asked: shares of right answers by model and task.
        choice: of a comparison, which method was best and how sure that is.
        unasked: why a visitor's questions were not asked, where they were not.
        log: what happened, a line each.
    """

    id: str
    owner: str
    key: str
    asked: dict[str, Any]
    state: str = QUEUED
    created: float = 0.0
    updated: float = 0.0
    started: float = 0.0
    message: str = ""
    url: str = ""
    plan: dict[str, Any] = field(default_factory=dict)
    bytes_read: int = 0
    bytes_written: int = 0
    bytes_sent: int = 0
    bytes_kept: int = 0
    read_speed: float = 0.0
    write_speed: float = 0.0
    sent_speed: float = 0.0
    seconds_left: float | None = None
    tensors_done: int = 0
    shards_done: int = 0
    memory_bytes: int = 0
    took: float = 0.0
    accuracies: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    choice: str = ""
    unasked: str = ""
    log: list[str] = field(default_factory=list)

    def may_see(self, account: str) -> bool:
        """Whether a visitor may see it: an account's job is that account's, others are a link's."""
        return not self.owner or self.owner == account

    def may_change(self, account: str, key: str = "") -> bool:
        """Whether a visitor may change it: the account, or the browser that started it."""
        return self.may_see(account) and bool(self.owner or self.key in ("", key))

    def say(self, text: str) -> None:
        """Add a line to the log, with the time."""
        clock = time.strftime("%H:%M:%S", time.gmtime())
        self.log.append(f"{clock} {text}")
        del self.log[:-_LOG_LINES]

    @property
    def progress(self) -> float:
        """How much of the output is made, 0 to 1."""
        if self.state == DONE:
            return 1.0
        total = int(self.plan.get("write_bytes") or 0)
        return min((self.bytes_kept + self.bytes_written) / total, 1.0) if total else 0.0


def new_job(asked: dict[str, Any], owner: str, key: str) -> Job:
    """Return a fresh job."""
    now = time.time()
    return Job(secrets.token_urlsafe(32), owner, key, asked, created=now, updated=now)


class Records:
    """Jobs as files of a folder, one each, replaced whole.

    Args:
        folder: is made when missing.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def write(self, job: Job) -> None:
        """Write a job's record."""
        self._replace(f"{job.id}.json", json.dumps(asdict(job)))

    def write_report(self, job_id: str, report: dict[str, Any]) -> None:
        """Write a finished job's report."""
        self._replace(f"{job_id}.report", json.dumps(report))

    def report_path(self, job_id: str) -> Path:
        """Return where a finished job's report lies."""
        return self.folder / f"{job_id}.report"

    def read_report(self, job_id: str) -> bytes | None:
        """Return a finished job's report as JSON, or None."""
        try:
            return self.report_path(job_id).read_bytes()
        except FileNotFoundError:
            return None

    def remove(self, job_id: str) -> None:
        """Forget a job."""
        for suffix in ("json", "report"):
            (self.folder / f"{job_id}.{suffix}").unlink(missing_ok=True)

    def read_all(self) -> Iterator[Job]:
        """Yield every readable record; one that is damaged is left alone."""
        for path in sorted(self.folder.glob("*.json")):
            try:
                stored = load_json(path.read_bytes())
                known = {field.name for field in fields(Job)}
                # An older version of this file may have known other things about a job.
                job = Job(**{key: value for key, value in stored.items() if key in known})
            except (OSError, ValueError, TypeError, AttributeError):
                continue
            if JOB_ID.fullmatch(job.id) and path.stem == job.id:
                yield job

    def _replace(self, name: str, text: str) -> None:
        # Only the account that runs the Space may read what its visitors merge.
        write_durably(self.folder / name, text.encode(), mode=0o600)
