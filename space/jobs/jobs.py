"""Jobs that outlive the tab: a queue, one process a running merge, records on the disk."""

import contextlib
import hashlib
import shutil
import statistics
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from resmerge_stream.errors import RecipeError, Remedy, error_from_dict
from resmerge_stream.planning.request import Request

from ..identity import network_of
from ..remedies import said
from ..settings import Settings
from .process import events, let_end, send, start_worker
from .progress import Live, apply, begin, done_in_words
from .records import (
    ACTIVE,
    CANCELLED,
    CONTINUABLE,
    DONE,
    FAILED,
    QUEUED,
    RESUMABLE,
    Job,
    Records,
    new_job,
)

# How often a running job's record is written, and how often old files are looked for.
_SAVE_S, _CLEAN_S = 3.0, 600.0
# Records stay longer than files: a link to a finished job still says what became of it.
_KEEP_RECORDS = 30
# Shorter plans tell what every merge costs beside its bytes; longer ones how fast this machine is.
_SHORT_S = 30.0
_LAST = 20


@dataclass(slots=True)
class _Run:
    """What is known of a job beside its record.

    Attributes:
        live: what a running picture shows; it stays when the run has ended.
        token: to read and publish with, until the run ends.
        address: where it was asked for, if without an account; never in a record.
        process: of the merge, while there is one.
        is_cancelling: whether it was told to stop.
        is_late: whether it was told to stop because it took too long.
    """

    live: Live = field(default_factory=Live)
    token: str | None = None
    address: str = ""
    process: "subprocess.Popen[str] | None" = None
    is_cancelling: bool = False
    is_late: bool = False


class Jobs:
    """The merges of one Space. Every method may be called from any thread.

    Args:
        settings: limits and the folder.

    A token is kept in memory, by job, from `submit` or `resume` until that run ends.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._records = Records(settings.folder / "jobs")
        self._changed = threading.Condition()
        self._queue: list[str] = []
        self._runs: dict[str, _Run] = {}
        self._runners: list[threading.Thread] = []
        self._closed = False
        self._jobs = {job.id: job for job in self._records.read_all()}
        for job in self._jobs.values():
            if job.state in ACTIVE:
                job.state = RESUMABLE
                job.message = "The Space was restarted. What was finished is kept."
                self._save(job)

    def submit(
        self,
        asked: Request,
        *,
        owner: str,
        key: str,
        token: str | None,
        address: str = "",
        questions: str = "",
        methods: Sequence[str] = (),
    ) -> Job:
        """Queue a merge and return its job; questions are asked once it is merged.

        With methods it is a comparison of them, and nothing is written.

        Raises:
            RecipeError: this visitor, or all of them, have too many jobs.
        """
        with self._changed:
            self.check_caps(owner, address)
            document = asked.to_dict() | ({"questions": questions} if questions else {})
            document |= {"methods": list(methods)} if methods else {}
            job = new_job(document, owner, key)
            self._jobs[job.id] = job
            self._enqueue(job, token, address)
            return job

    def resume(self, job: Job, token: str | None) -> None:
        """Queue a stopped job again.

        Raises:
            RecipeError: it is not one that can go on, or there are too many.
        """
        with self._changed:
            if job.state not in CONTINUABLE:
                raise RecipeError(f"this job is {job.state}, so there is nothing to continue.")
            self.check_caps(job.owner)
            self._enqueue(job, token)

    def cancel(self, job: Job) -> None:
        """Stop a job; a merge that runs ends within seconds, wherever it is."""
        with self._changed:
            if job.state == QUEUED:
                self._queue.remove(job.id)
                self._runs[job.id].token = None
                self._end(job, CANCELLED, "Cancelled before it started.")
            elif job.state in ACTIVE and not self._runs[job.id].is_cancelling:
                run = self._runs[job.id]
                run.is_cancelling = True
                job.message = "Stopping."
                job.say("cancel was asked for")
                _tell_to_stop(run)

    def give_up(self, job: Job, removed: list[str]) -> None:
        """End a stopped job for good, after what it left was removed."""
        with self._changed:
            if job.state in ACTIVE or job.state == DONE:
                raise RecipeError(f"this job is {job.state}; nothing of it is removed.")
            left = f"Removed: {', '.join(removed)}." if removed else "Nothing of it was left."
            self._end(job, FAILED, left)

    def get(self, job_id: str) -> Job | None:
        """Return a job by its id."""
        return self._jobs.get(job_id)

    def of(self, owner: str, key: str = "") -> list[Job]:
        """Return the jobs of an account, and those that a browser started without one.

        Args:
            owner: the account's name; empty for none.
            key: of the browser, see `Job.key`; empty for none.

        Returns:
            The newest first.
        """
        with self._changed:
            mine = [
                job
                for job in self._jobs.values()
                if (owner and job.owner == owner) or (key and not job.owner and job.key == key)
            ]
        return sorted(mine, key=lambda job: -job.created)

    def live(self, job: Job) -> Live:
        """Return what is known of a job beside its record."""
        run = self._runs.get(job.id)
        return run.live if run is not None else Live()

    def place(self, job: Job) -> int:
        """Return how many jobs are before a queued one, those that run included; never waits."""
        queue = self._in_order()
        running = sum(run.process is not None for run in list(self._runs.values()))
        return queue.index(job.id) + running if job.id in queue else 0

    def expected_seconds(self, planned: float) -> float | None:
        """Return how long a merge takes here by the finished ones, see `expected_seconds`."""
        return expected_seconds(planned, list(self._jobs.values()))

    def report(self, job: Job) -> bytes | None:
        """Return the report of a finished job as JSON, or None."""
        return self._records.read_report(job.id)

    def report_path(self, job: Job) -> Path:
        """Return the file of a job's report, which is there once it is done."""
        return self._records.report_path(job.id)

    def result(self, job: Job) -> Path:
        """Return the folder of a job's output, for one that publishes nothing."""
        return self.settings.folder / "results" / job.id / "merged"

    def close(self) -> None:
        """Stop every merge; their jobs are resumable when the Space comes back."""
        with self._changed:
            self._closed = True
            for run in self._runs.values():
                _tell_to_stop(run)
            self._changed.notify_all()
        for runner in self._runners:
            runner.join(timeout=15)

    def check_caps(self, owner: str, address: str = "") -> None:
        """Refuse an account, an address without one, or all of those, with too many jobs already.

        A network, which may have any number of addresses, holds half of those places at most.

        Args:
            owner: the account; empty for none.
            address: of somebody without one; empty where it says nothing.

        Raises:
            RecipeError: as many as are allowed are queued or running.
        """
        settings = self.settings
        jobs = [job for job in list(self._jobs.values()) if job.state in ACTIVE]
        mine = [job for job in jobs if job.owner == owner]
        if not owner and address and address in map(self._address, mine):
            raise RecipeError(
                "a merge of yours is queued or running. Wait for it, or cancel it.",
                Remedy.SIGN_IN,
                kind="busy",
            )
        cap = settings.jobs_per_user if owner else settings.anonymous_jobs
        network = network_of(address)
        near = sum(network_of(self._address(job)) == network for job in mine)
        if not owner and address and near >= max(1, cap // 2):
            raise RecipeError(
                f"visitors from your network have {near} jobs queued or running. Wait.",
                Remedy.SIGN_IN,
                kind="busy",
            )
        if len(mine) >= cap:
            whose = f"you have {len(mine)} jobs" if owner else f"visitors have {len(mine)} jobs"
            raise RecipeError(
                f"{whose} queued or running, and {cap} are allowed at a time. Wait.", kind="busy"
            )

    def _address(self, job: Job) -> str:
        run = self._runs.get(job.id)
        return run.address if run is not None else ""

    def _in_order(self) -> list[str]:
        """Return the queue as it will be served.

        Accounts come before those without, and everybody's first job before anybody's second;
        what somebody has running counts as a job of theirs.
        """
        ahead: Counter[str] = Counter()
        for job_id, run in list(self._runs.items()):
            if run.process is not None and job_id in self._jobs:
                ahead[self._who(job_id)] += 1
        keys = []
        for number, job_id in enumerate(list(self._queue)):
            who = self._who(job_id)
            keys.append((not self._jobs[job_id].owner, ahead[who], number, job_id))
            ahead[who] += 1
        return [job_id for *_, job_id in sorted(keys)]

    def _who(self, job_id: str) -> str:
        job = self._jobs[job_id]
        return f"@{job.owner}" if job.owner else self._address(job) or job_id

    def _enqueue(self, job: Job, token: str | None, address: str = "") -> None:
        job.state, job.message = QUEUED, "Waiting for its turn."
        job.say("queued")
        self._runs[job.id] = _Run(token=token, address=address)
        self._queue.append(job.id)
        self._save(job)
        if not self._runners:
            self._start_runners()
        self._changed.notify()

    def _start_runners(self) -> None:
        for number in range(self.settings.running):
            runner = threading.Thread(target=self._work, name=f"merge-{number}", daemon=True)
            self._runners.append(runner)
            runner.start()

    def _work(self) -> None:
        """Take jobs from the queue, one after the other; a runner's whole life."""
        cleaned = 0.0
        while True:
            if time.monotonic() - cleaned > _CLEAN_S:
                self._clean()
                cleaned = time.monotonic()
            with self._changed:
                if not self._queue and not self._closed:
                    self._changed.wait(_CLEAN_S)
                if self._closed:
                    return
                if not self._queue:
                    continue
                job = self._jobs[self._in_order()[0]]
                self._queue.remove(job.id)
                run = self._runs[job.id]
                begin(job, run.live)
                process = run.process = start_worker(self.settings)
            self._run(job, run, process)
            with self._changed:
                self._make_room(list(self._jobs.values()))

    def _run(self, job: Job, run: _Run, process: "subprocess.Popen[str]") -> None:
        request = {
            "asked": job.asked,
            "token": run.token,
            "out": None if job.asked.get("push_to") else str(self.result(job)),
            "work_dir": str(self._work_dir(job)),
            "ask_seconds": self.settings.ask_seconds,
            "prompts": 0 if job.asked.get("push_to") else self.settings.prompts,
        }
        last: dict[str, Any] = {}
        timer = threading.Timer(self._merge_seconds(job), self._stop_late, [run])
        timer.daemon = True
        timer.start()
        try:
            with process:
                send(process, request)
                for last in events(process):
                    self._apply(job, run.live, last)
                let_end(process)
        finally:
            timer.cancel()
            with self._changed:
                run.token = run.process = None
                self._conclude(job, run, last, process.returncode)

    def _merge_seconds(self, job: Job) -> float:
        settings = self.settings
        return settings.merge_seconds if job.owner else settings.anonymous_merge_seconds

    def _stop_late(self, run: _Run) -> None:
        with self._changed:
            run.is_late = True
            _tell_to_stop(run)

    def _apply(self, job: Job, live: Live, event: dict[str, Any]) -> None:
        with self._changed:
            report = apply(job, live, event)
            if report is not None:
                self._records.write_report(job.id, report)
            if report is not None or time.time() - job.updated > _SAVE_S:
                self._save(job)

    def _conclude(self, job: Job, run: _Run, last: dict[str, Any], code: int) -> None:
        kind = last.get("event")
        kept = "No file was finished"
        if job.shards_done:
            kept = f"{job.shards_done} of {job.plan.get('shards')} files are finished and kept"
        if kind == "finished":
            self._end(job, DONE, done_in_words(job, last))
        elif run.is_cancelling:
            self._end(job, CANCELLED, f"Cancelled. {kept}. To go on, merge the same again.")
        elif run.is_late:
            minutes = self._merge_seconds(job) / 60
            why = f"A merge may take {minutes:.0f} min at a time here. {kept}. Continue it, or "
            self._end(job, RESUMABLE, why + "duplicate this Space onto hardware of your own.")
        elif kind == "refused":
            self._end(job, FAILED, said(error_from_dict(last)))
        elif kind == "stopped":
            self._end(job, RESUMABLE, said(error_from_dict(last)))
        elif code < 0 or code == 130:
            why = "The Space stopped" if self._closed else "The system ended the merge, most often "
            why += "" if self._closed else "for lack of memory"
            self._end(job, RESUMABLE, f"{why}. {kept}.")
        else:
            self._end(job, FAILED, "An error in this program ended the merge; the log has more.")

    def _end(self, job: Job, state: str, message: str) -> None:
        job.state, job.message, job.memory_bytes = state, message, 0
        job.read_speed = job.write_speed = job.sent_speed = 0.0
        job.seconds_left = None
        job.say(f"{state}: {message}")
        self._save(job)

    def _work_dir(self, job: Job) -> Path:
        # Shards of one account are never picked up by a job of another.
        owner = hashlib.sha256((job.owner or job.id).encode()).hexdigest()[:16]
        return self.settings.folder / "work" / owner

    def _save(self, job: Job) -> None:
        job.updated = time.time()
        self._records.write(job)

    def _clean(self) -> None:
        """Remove results, journals and records that nobody came back for."""
        now, keep = time.time(), self.settings.keep_seconds
        with self._changed:
            jobs = list(self._jobs.values())
            for job in jobs:
                if job.state in ACTIVE:
                    continue
                if now - job.updated > keep:
                    shutil.rmtree(self.result(job).parent, ignore_errors=True)
                    self._runs.pop(job.id, None)
                if now - job.updated > keep * _KEEP_RECORDS:
                    self._records.remove(job.id)
                    del self._jobs[job.id]
            self._make_room(jobs)
            busy = {self._work_dir(job) for job in jobs if now - job.updated <= keep}
            busy |= {self._work_dir(job) for job in jobs if job.state in ACTIVE}
            for folder in (self.settings.folder / "work").glob("*"):
                if folder not in busy:
                    shutil.rmtree(folder, ignore_errors=True)

    def _make_room(self, jobs: list[Job]) -> None:
        """Remove the oldest results beyond what all of them may have."""
        room = self.settings.result_bytes
        for job in sorted(jobs, key=lambda job: -job.updated):
            folder = self.result(job).parent
            if job.state in ACTIVE or not folder.exists():
                continue
            room -= sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
            if room < 0:
                shutil.rmtree(folder, ignore_errors=True)


def expected_seconds(planned: float, jobs: Iterable[Job]) -> float | None:
    """Return how long a visitor will wait for a merge that runs alone; None if nothing tells.

    Args:
        planned: the plan's own estimate.
        jobs: all that are remembered; those count that finished without having been stopped.
    """
    told = [job for job in jobs if job.state == DONE and job.took > 0 and not job.bytes_kept]
    pairs = [
        (float(job.plan["seconds_estimate"]), job.took)
        for job in sorted(told, key=lambda job: -job.created)[:_LAST]
        if job.plan.get("seconds_estimate")
    ]
    if not pairs:
        return None
    short = [took - estimate for estimate, took in pairs if estimate < _SHORT_S]
    beside = max(statistics.median(short), 0.0) if short else 0.0
    long = [max(took - beside, 0.0) / estimate for estimate, took in pairs if estimate >= _SHORT_S]
    return beside + planned * (statistics.median(long) if long else 1.0)


def _tell_to_stop(run: _Run) -> None:
    if run.process is not None and run.process.stdin is not None:
        with contextlib.suppress(OSError, ValueError):
            run.process.stdin.close()
