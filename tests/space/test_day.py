"""A day of the Space, its clock simulated: at its end memory, threads and folders are as before."""

import gc
import os
import random
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

import space.asked
import space.gate
import space.jobs.jobs
import space.jobs.planning
from resmerge_stream.device import private_memory
from space.examples import examples
from space.gate import Pace
from space.identity import Visitor, Visitors
from space.jobs.jobs import Jobs
from space.jobs.planning import Allowance, Planners
from space.jobs.process import send, start_worker
from space.jobs.records import ACTIVE
from space.page.handlers import Handlers
from space.page.news import News
from space.search import Search
from space.service import Service
from space.settings import Settings
from tests.space.test_gate import behind

DAY_S = 86_400.0
BUILT_IN = {"recipe": {"base_model": examples()[0].base, "models": list(examples()[0].experts)}}
# What a worker does whose merge is done already: it reads, writes the files, says the events.
WORKER = """
import os, shutil, sys, json
asked = json.loads(sys.stdin.readline() or "null")
if asked:
    shutil.copytree(sys.argv[1] + "/merged", asked["out"])
    os.makedirs(asked["work_dir"], exist_ok=True)
    sys.stdout.write(open(sys.argv[1] + "/events").read())
"""


class Clock:
    """The day's time, for the modules that ask for it."""

    def __init__(self) -> None:
        self.now = time.time()

    def module(self) -> SimpleNamespace:
        """Stand in for the module `time`; what sleeps does."""
        ask = lambda: self.now  # noqa: E731
        return SimpleNamespace(
            time=ask, monotonic=ask, sleep=time.sleep, strftime=time.strftime, gmtime=time.gmtime
        )


@pytest.fixture
def recorded(tmp_path: Path) -> Path:
    """A real merge of the built-in example by a real worker: its files and its events."""
    settings = Settings(folder=tmp_path / "first", prompts=0)
    place = tmp_path / "recorded"
    process = start_worker(settings)  # which stops when its input is closed
    asked = {"asked": BUILT_IN, "out": str(place / "merged"), "work_dir": str(tmp_path / "w")}
    with process:
        send(process, asked)
        assert process.stdout is not None
        said = process.stdout.read()
    assert process.returncode == 0, said[-2000:]
    (place / "events").write_text(said)
    for path in (place / "merged").glob("*.safetensors"):
        os.truncate(path, 50_000)  # a day's files are only counted
    return place


def files(folder: Path) -> list[str]:
    """Return the paths of the files below a folder."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def live_through(monkeypatch, folder: Path, recorded: Path, visits: int, jobs: int) -> dict:
    """Let visitors come through a day, merge, and the Space restart; return what is left."""
    clock, draw = Clock(), random.Random(visits)
    for module in (space.jobs.jobs, space.jobs.planning, space.gate):
        monkeypatch.setattr(module, "time", clock.module())
    started = lambda settings, module="": subprocess.Popen(  # noqa: E731
        [sys.executable, "-S", "-c", WORKER, str(recorded)], stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    monkeypatch.setattr(space.jobs.jobs, "start_worker", started)
    settings = Settings(folder=folder, prompts=0, anonymous_jobs=50, result_bytes=2_000_000)
    visitors = Visitors({"t": Visitor("alice", "t", ())}.__getitem__)

    def service_of() -> Service:
        made = Service(settings, Jobs(settings), visitors, Search(), Planners(settings))
        monkeypatch.setattr(made.planners, "_allowance", Allowance(30))
        return made

    service = service_of()
    gate = behind(Pace)
    seen = []
    for number in range(visits):
        clock.now += DAY_S / visits
        address = f"8.{draw.randrange(200)}.{draw.randrange(200)}.{draw.randrange(200)}"
        assert gate.get("/", headers={"x-forwarded-for": address}).status_code == 200
        handlers = Handlers(service, News(service))
        # Not by monkeypatch, which would keep each of them.
        handlers.following._on_hub = lambda visitor: []
        request = SimpleNamespace(
            query_params={}, session_hash=str(number), headers={},
            client=SimpleNamespace(host=address),
        )  # fmt: skip
        handlers.load({"remembered": {}}, request, None)
        if number % (visits // jobs) == 0:
            asked = space.asked.web_request(BUILT_IN, settings)
            job = service.submit(asked, Visitor(), key=f"k{number}", address=address)
            seen.append(job)
            if len(seen) % (jobs // 4) == 0:  # in the middle of it
                service.close()
                service = service_of()
                assert service.jobs.get(job.id).state not in ACTIVE
            else:
                until(lambda job=job: job.state not in ACTIVE)
        with service.jobs._changed:  # nothing is removed meanwhile
            assert result_bytes(folder) <= settings.result_bytes + 1_000_000
    clock.now += 40 * DAY_S  # records stay for a month
    last = service.submit(
        space.asked.web_request(BUILT_IN, settings), Visitor(), key="last", address="9.9.9.9"
    )
    until(lambda: last.state not in ACTIVE)
    service.jobs._clean()
    service.close()
    states = {job.state for job in seen}
    return {"files": files(folder), "last": last.id, "states": states}


def until(condition) -> None:
    """Wait until something is so."""
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def result_bytes(folder: Path) -> int:
    """Return the bytes of all results that are kept."""
    kept = (folder / "results").rglob("*") if (folder / "results").exists() else ()
    return sum(path.stat().st_size for path in kept if path.is_file())


def a_day(monkeypatch, tmp_path: Path, recorded: Path, visits: int, jobs: int) -> None:
    """Live through a tenth of a day, note what there is, live through a whole one, and compare."""
    live_through(monkeypatch, tmp_path / "warm", recorded, visits // 10, max(jobs // 10, 4))
    shutil.rmtree(tmp_path / "warm")
    gc.collect()
    memory, threads = private_memory(), threading.active_count()
    handles = len(os.listdir("/proc/self/fd"))

    left = live_through(monkeypatch, tmp_path / "day", recorded, visits, jobs)

    gc.collect()
    assert left["states"] <= {"done", "resumable", "queued"}
    assert all(left["last"] in name for name in left["files"]), left["files"]
    assert private_memory() - memory < 40_000_000
    assert threading.active_count() <= threads
    assert len(os.listdir("/proc/self/fd")) <= handles + 2


def test_a_busy_hour_leaves_nothing(monkeypatch, tmp_path, recorded):
    """Visits, jobs and restarts of an hour: folders, memory and threads are as before."""
    a_day(monkeypatch, tmp_path, recorded, visits=200, jobs=20)


@pytest.mark.slow
def test_a_day_leaves_nothing(monkeypatch, tmp_path, recorded):
    """5,000 visits, 500 jobs, four restarts: folders, memory and threads are as before."""
    a_day(monkeypatch, tmp_path, recorded, visits=5_000, jobs=500)
