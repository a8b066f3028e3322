"""What the tests of Jobs share: what the loopback Hub was told, and how its Jobs end."""

from collections.abc import Iterator
from contextlib import contextmanager

from loopback_hub import Hook
from loopback_hub.job_runner import JobRecord
from tests.support.hub_runs import Bench

JOB_ENVIRONMENT = {
    "HF_HUB_DISABLE_XET": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_UPDATE_CHECK": "1",
    "OMP_NUM_THREADS": "1",
}


@contextmanager
def no_jobs(bench: Bench) -> Iterator[None]:
    """A Hub that has heard nothing yet; afterwards no Job runs on it, and it is what it was."""
    hardware = bench.hub.settings.hardware
    bench.hub.log.clear()
    bench.hub.recorded.payloads.clear()
    yield
    bench.hub.faults.clear()
    bench.hub.settings.run_jobs = None
    bench.hub.settings.hardware = hardware
    for job in bench.hub.recorded.jobs.values():
        job.end("CANCELED")
    bench.hub.recorded.jobs.clear()


def run_jobs(bench: Bench) -> None:
    """Let the Hub run what is submitted from here on."""
    bench.hub.settings.run_jobs = JOB_ENVIRONMENT


def jobs(bench: Bench) -> list[JobRecord]:
    """Return the Jobs of a test, oldest first."""
    return list(bench.hub.recorded.jobs.values())


def payload(bench: Bench) -> dict:
    """Return the body of the one request that started a Job."""
    (found,) = (body for path, body in bench.hub.recorded.payloads if path.endswith("/jobs/alice"))
    return found


def ends(bench: Bench, *lines: str, stage: str = "COMPLETED", skip: int = 0) -> None:
    """Let the newest Job say these lines and end, when its log is asked for."""

    def call() -> None:
        for line in lines:
            jobs(bench)[-1].say(line)
        jobs(bench)[-1].end(stage)

    bench.hub.faults.add(Hook(call=call), path="/logs", times=1, skip=skip)
