"""The table of how fast earlier Jobs were: what it tells and forgets, and a damaged one."""

import json
import os
from collections.abc import Callable
from datetime import date, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from resmerge_stream.hub.flavors import FLAVORS
from resmerge_stream.jobs.job import HubJob, JobLog
from resmerge_stream.jobs.speeds import JobRun, Speeds, in_words, keep_speed
from resmerge_stream.planning.costs import HUB_RATE
from resmerge_stream.planning.machines import Speed, Work, assumed

BASIC, UPGRADE = FLAVORS[:2]
TODAY = date(2026, 11, 30)


def run(number: int = 0, *, day: date = TODAY, **measured: float) -> JobRun:
    """Return what one Job measured: ten minutes of which the line took all."""
    values = {"start_s": 60.0, "seconds": 600.0, "moved_bytes": 60e9, "arithmetic_s": 10.0}
    return JobRun.of(f"job {number}", **{**values, **measured}, today=day)


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """Where the table is kept."""
    return tmp_path / "cache" / "speeds.json"


def test_nothing_measured_is_assumed_and_said_so(table: Path) -> None:
    """Without a Job the assumed speed holds, and its words say that it is one."""
    speed = Speeds(table, today=TODAY).of(BASIC)

    assert speed == assumed(BASIC)
    assert "assumed" in in_words(speed)
    assert "50 MB/s each way" in in_words(speed)


def test_what_the_last_jobs_reached_is_taken(table: Path) -> None:
    """Medians of start and line, with how many Jobs and how old the last one is."""
    speeds = Speeds(table, today=TODAY)
    for number, seconds in enumerate((300.0, 600.0, 6000.0)):
        speeds.add("cpu-basic", run(number, seconds=seconds, day=TODAY - timedelta(days=3)))

    speed = Speeds(table, today=TODAY).of(BASIC)

    assert (speed.start_s, speed.line, speed.runs, speed.days) == (60.0, 100e6, 3, 3)
    assert in_words(speed) == "100 MB/s each way, 60 s to start: measured 3 days ago on 3 runs"
    assert Speeds(table, today=TODAY).of(UPGRADE) == assumed(UPGRADE)


@pytest.mark.parametrize(
    ("moved", "arithmetic", "seconds"),
    [(60e9, 10.0, 4000.0), (60e9, 10.0, 200.0), (1e9, 900.0, 2000.0), (1e9, 900.0, 300.0)],
    ids=["slow line", "fast line", "slow cores", "fast cores"],
)
def test_the_same_merge_again_is_estimated_at_what_it_took(
    table: Path, moved: float, arithmetic: float, seconds: float
) -> None:
    """Whatever held the last one up, line and arithmetic together give its time again."""
    speeds = Speeds(table, today=TODAY)
    speeds.add("cpu-basic", run(seconds=seconds, moved_bytes=moved, arithmetic_s=arithmetic))

    speed = speeds.of(BASIC)

    assert max(moved / speed.line, arithmetic * speed.arithmetic) == pytest.approx(seconds)


def test_a_merge_of_seconds_tells_the_start_alone(table: Path) -> None:
    """A tiny merge says nothing of the line: one of terabytes would be estimated at years."""
    speeds = Speeds(table, today=TODAY)
    speeds.add("cpu-basic", run(start_s=33.0, seconds=4.0, moved_bytes=1e6))

    speed = speeds.of(BASIC)

    assert (speed.start_s, speed.line, speed.arithmetic) == (33.0, HUB_RATE, 1.0)


def test_a_job_that_was_followed_twice_counts_once(table: Path) -> None:
    """Two commands that follow one Job measure the same run."""
    speeds = Speeds(table, today=TODAY)
    for _ in range(2):
        speeds.add("cpu-basic", run(7))

    assert speeds.of(BASIC).runs == 1


def test_the_table_is_bounded(table: Path) -> None:
    """A thousand Jobs on two hundred machines leave a small file: the newest stay, old ones go."""
    speeds = Speeds(table, today=TODAY)
    speeds.add("cpu-basic", run(0, day=TODAY - timedelta(days=400)))
    for number in range(1000):
        speeds.add(f"machine-{number % 200}", run(number))
    for number in range(20):
        speeds.add("cpu-upgrade", run(number, start_s=float(number)))

    stored = json.loads(table.read_text())["flavors"]
    assert len(stored) <= 64
    assert max(len(runs) for runs in stored.values()) <= 8
    assert "cpu-basic" not in stored
    assert speeds.of(UPGRADE).start_s == 15.5  # of 12 to 19, the last eight
    assert table.stat().st_size < 262_144
    assert os.listdir(table.parent) == [table.name]


def test_the_table_knows_nobody(table: Path) -> None:
    """A day and numbers: no id of a Job, no model, no account."""
    Speeds(table, today=TODAY).add("cpu-basic", run())

    (entry,) = json.loads(table.read_text())["flavors"]["cpu-basic"]
    assert set(entry) == {"key", "day", "start_s", "seconds", "moved_bytes", "arithmetic_s"}
    assert "job 0" not in table.read_text()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"\xff\xfe",
        b'{"version": 99, "flavors": {}}',
        b'{"version": 1}',
        b'{"version": 1, "flavors": [1]}',
        b'{"version": 1, "flavors": {"cpu-basic": [{"key": "x"}]}}',
        b'{"version": 1, "flavors": {"cpu-basic": 5}}',
        b'{"version": 1, "flavors": {"cpu-basic": [{"key": "x", "day": "soon", "start_s": 1, '
        b'"seconds": 1, "moved_bytes": 1, "arithmetic_s": 1}]}}',
        b'{"version": 1, "flavors": {"cpu-basic": [{"key": "x", "day": "2026-11-30", "start_s": '
        b'NaN, "seconds": 1, "moved_bytes": 1, "arithmetic_s": 1}]}}',
        b" " * 300_000,
    ],
    ids=["empty", "cut", "list", "bytes", "version", "bare", "flavors", "entry", "number", "day",
         "nan", "large"],
)  # fmt: skip
def test_a_damaged_table_is_ignored_with_a_word(table: Path, content: bytes) -> None:
    """Whatever stands there, the assumed speed is taken; the next Job writes the table anew."""
    table.parent.mkdir()
    table.write_bytes(content)
    said: list[str] = []
    speeds = Speeds(table, say=said.append, today=TODAY)

    assert [speeds.of(flavor) for flavor in (BASIC, UPGRADE)] == [assumed(BASIC), assumed(UPGRADE)]
    assert len(said) == 1
    assert "is not read" in said[0]
    speeds.add("cpu-basic", run())
    assert Speeds(table, today=TODAY).of(BASIC).runs == 1


def test_a_table_that_cannot_be_written_stops_nothing(tmp_path: Path) -> None:
    """Where there is a file in the folder's place, a line says so and the command goes on."""
    (tmp_path / "cache").write_text("in the way")
    said: list[str] = []

    Speeds(tmp_path / "cache" / "speeds.json", say=said.append, today=TODAY).add("cpu-basic", run())

    assert any("is not kept" in line for line in said)


def measured(attempts: int = 1, merged: tuple[float, int, int] | None = None) -> JobLog:
    """Return the log of a Job that merged for ten minutes."""
    return JobLog(attempts=attempts, merged=merged or (600.0, 60_000_000_000, 15_000_000_000))


WORK = Work(60_000_000_000, 100.0)


def merges(work: Work | None = WORK) -> HubJob:
    """Return a Job of so much work, of which no machine is known."""
    return cast(HubJob, SimpleNamespace(work_on=work and (lambda flavor: work), offered=None))


@pytest.fixture
def keep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Speed]:
    """Keep the speed of one Job in a cache of its own, and return what the machine then has."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def keep(job: HubJob, log: JobLog, machines: int = 1, total_s: float | None = 700.0) -> Speed:
        keep_speed(job, log, "id", "cpu-basic", machines, total_s, lambda text: None)
        return Speeds().of(BASIC)

    return keep


def test_a_job_that_was_followed_to_its_end_is_measured(keep: Callable[..., Speed]) -> None:
    """Its start is the Hub's time less the merge's; of several machines each moved its part."""
    assert keep(merges(), measured())[:3] == (100.0, 100e6, 1.0)
    assert keep(merges(), measured(), 4).line == 25e6


@pytest.mark.parametrize(
    ("job", "log", "total_s"),
    [
        (merges(None), measured(), 700.0),
        (merges(), JobLog(), 700.0),
        (merges(), measured(attempts=2), 700.0),
        (merges(), measured(), None),
        (merges(), measured(merged=(600.0, 0, 0)), 700.0),
    ],
    ids=["evaluation", "unfinished", "again", "no times", "nothing read"],
)
def test_what_tells_no_speed_is_not_kept(
    keep: Callable[..., Speed], job: HubJob, log: JobLog, total_s: float | None
) -> None:
    """An evaluation, a second attempt and a log without an end change no estimate."""
    assert keep(job, log, 1, total_s) == assumed(BASIC)


def test_what_an_earlier_job_had_published_is_not_counted(keep: Callable[..., Speed]) -> None:
    """A merge that continued did a part of the arithmetic: what it did took the time it had."""
    work = Work(10_000_000_000, 4000.0)

    speed = keep(merges(work), measured(merged=(1000.0, 2_500_000_000, 1_000_000_000)), 1, 1100.0)

    assert speed.arithmetic == pytest.approx(1.0)
