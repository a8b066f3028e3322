"""What is seen of a merge that goes on: a bar on a terminal, a line now and then in a log."""

import io
import itertools
import re
from collections.abc import Iterator

import pytest

from resmerge_stream.cli import console
from resmerge_stream.run.events import Event, Planned, Progressed, TensorMerged

TOTAL, SECONDS = 1000, 1000


class Clock:
    """A clock that the events set."""

    now = 0.0

    def monotonic(self) -> float:
        """Return what it was set to."""
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The console's clock."""
    clock = Clock()
    monkeypatch.setattr(console, "time", clock)
    return clock


def events(clock: Clock, *, stops_at: int = SECONDS, ends: int = SECONDS) -> Iterator[Event]:
    """A merge of a kilobyte in a thousand seconds, told of each second; the Hub may go away."""
    plan = {
        "method": "mean",
        "chosen_by": "option",
        "shards": [{"name": "a", "bytes": TOTAL}],
        "warnings": [],
    }
    yield Planned(plan=plan)
    for second in range(1, ends + 1):
        clock.now = float(second)
        done = min(second, stops_at)
        waiting = "waiting: the Hub is away" if second > stops_at else None
        yield Progressed(
            bytes_written=done, write_speed=1.0, seconds_left=TOTAL - done, waiting=waiting
        )


def test_a_log_gets_a_line_a_minute(
    clock: Clock, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With speed and time left; at each tenth as well, and never a bar."""
    monkeypatch.setattr(console, "say", lambda text: said.append((clock.now, text)))
    said: list[tuple[float, str]] = []

    console.follow(events(clock))

    moments = [moment for moment, _ in said]
    assert max(b - a for a, b in itertools.pairwise(moments)) <= 60
    assert len(said) <= SECONDS / 60 + 10 + 3
    for _, text in said[2:-1]:  # after the method and the size
        assert re.fullmatch(r"merging: \d+ %, .+ of .+, 1 B/s, (\d+ s|\d+ min) left", text)
    assert "\r" not in capsys.readouterr().err


def test_a_log_says_what_is_waited_for(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """While nothing comes, the line of the minute says why."""
    said: list[str] = []
    monkeypatch.setattr(console, "say", said.append)

    console.follow(events(clock, stops_at=150, ends=400))

    waits = [text for text in said if text.endswith(", waiting: the Hub is away")]
    assert 3 <= len(waits) <= 6


def test_a_log_of_a_run_without_a_model_has_lines_too(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    """What compares or analyses tells a log how much it has read, and never draws a bar."""

    def told() -> Iterator[Event]:
        yield Planned(plan={"read_bytes": TOTAL, "warnings": []})
        for done in range(10, TOTAL + 1, 10):
            yield TensorMerged(tensor="a.weight", rule="mean", entry={}, bytes_read=done)

    console.count(told())

    lines = capsys.readouterr().err
    assert "\r" not in lines
    assert [int(share) for share in re.findall(r"reading: (\d+) %", lines)] == [*range(10, 101, 10)]


class Terminal(io.StringIO):
    """What claims to be a terminal."""

    def isatty(self) -> bool:
        """Return True."""
        return True


def test_a_terminal_shows_one_time_left(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """The merge's own, of merging and sending; the bar's guess is not shown beside it."""
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)

    def told() -> Iterator[Event]:
        yield from events(clock, ends=3)
        yield TensorMerged(
            tensor="a.weight", rule="mean", entry={}, bytes_written=4, seconds_left=996.0
        )

    console.follow(told())

    shown = [line for line in terminal.getvalue().split("\r") if "left" in line]
    assert shown
    assert all(line.count("left") == 1 and "<" not in line for line in shown)
    assert "17 min left" in terminal.getvalue()
