"""How fast this user's last Jobs were on each of the Hub's machines: a small table in the cache.

It holds a machine's name, a day and five numbers of each Job: nothing of models, repositories or
accounts.
"""

import hashlib
import json
import os
import statistics
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from ..device import default_work_dir
from ..documents import load_json
from ..hub.flavors import FLAVORS, Flavor
from ..planning.costs import HUB_RATE
from ..planning.machines import Speed, assumed
from ..units import format_duration, format_size

if TYPE_CHECKING:
    from .job import HubJob, JobLog

_VERSION = 1
# What is kept: Jobs a machine, machines, days; more bytes than that are not this table.
_MOST_RUNS, _MOST_FLAVORS, _MOST_DAYS, _MOST_BYTES = 8, 64, 180, 262_144
# A shorter merge is mostly its beginning: it tells nothing of line and arithmetic.
_LEAST_SECONDS = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class JobRun:
    """One Job that merged and published.

    Attributes:
        key: tells it from others; made of its id.
        day: of its end, as ISO 8601.
        start_s: from its creation until the merge began.
        seconds: of the merge.
        moved_bytes: of one machine, in the direction in which more went over the line.
        arithmetic_s: that one machine's share of the arithmetic was estimated at.
    """

    key: str
    day: str
    start_s: float
    seconds: float
    moved_bytes: float
    arithmetic_s: float

    @classmethod
    def of(
        cls,
        job_id: str,
        *,
        start_s: float,
        seconds: float,
        moved_bytes: float,
        arithmetic_s: float,
        today: date | None = None,
    ) -> Self:
        """Return what a Job that ended today measured."""
        return cls(
            key=hashlib.sha256(job_id.encode()).hexdigest()[:8],
            day=(today or datetime.now(UTC).date()).isoformat(),
            start_s=round(start_s, 1),
            seconds=round(seconds, 1),
            moved_bytes=round(moved_bytes),
            arithmetic_s=round(arithmetic_s, 1),
        )

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> Self:
        """Return what the table has.

        Raises:
            ValueError: it is something else.
        """
        names = {known.name for known in fields(cls)}
        if not isinstance(stored, dict) or set(stored) != names:
            raise ValueError("an entry has other fields")
        numbers = [value for name, value in stored.items() if name not in ("key", "day")]
        are_numbers = all(type(n) in (int, float) and 0 <= n < 1e18 for n in numbers)
        if not are_numbers or not isinstance(stored["key"], str) or len(stored["key"]) > 8:
            raise ValueError("an entry has other values")
        date.fromisoformat(stored["day"])
        return cls(**stored)

    @property
    def line(self) -> float | None:
        """Bytes a second that the line made at least; None where too little went over it.

        What was expected to bind gets all of the time; the other was at least that fast.
        """
        if self.seconds < _LEAST_SECONDS or not self.moved_bytes:
            return None
        reached = self.moved_bytes / self.seconds
        return reached if self._is_bound_by_line else max(reached, HUB_RATE)

    @property
    def arithmetic(self) -> float | None:
        """Seconds that a second of estimated arithmetic took; None where there was too little."""
        if self.seconds < _LEAST_SECONDS or not self.arithmetic_s:
            return None
        took = self.seconds / self.arithmetic_s
        return min(took, 1.0) if self._is_bound_by_line else took

    @property
    def _is_bound_by_line(self) -> bool:
        return self.moved_bytes / HUB_RATE >= self.arithmetic_s


class Speeds:
    """The table.

    Args:
        path: of its file; in the user's cache folder when None.
        say: told in a line that it cannot be read, or written.
        today: the day from which ages are counted; the real one when None.
    """

    def __init__(
        self,
        path: Path | None = None,
        *,
        say: Callable[[str], None] = lambda text: None,
        today: date | None = None,
    ) -> None:
        self.path = path or default_work_dir() / "job-speeds.json"
        self._say, self._today = say, today or datetime.now(UTC).date()
        self._known: dict[str, list[JobRun]] | None = None

    def of(self, flavor: Flavor) -> Speed:
        """Return how fast a machine is: medians of its last Jobs; assumed where there are none."""
        if self._known is None:
            self._known = self._read()
        runs, speed = self._known.get(flavor.name, []), assumed(flavor)
        if not runs:
            return speed
        lines = [run.line for run in runs if run.line is not None]
        factors = [run.arithmetic for run in runs if run.arithmetic is not None]
        newest = max(date.fromisoformat(run.day) for run in runs)
        return Speed(
            start_s=statistics.median(run.start_s for run in runs),
            line=statistics.median(lines or [speed.line]),
            arithmetic=statistics.median(factors or [speed.arithmetic]),
            runs=len(runs),
            days=max((self._today - newest).days, 0),
        )

    def add(self, name: str, run: JobRun) -> None:
        """Keep what a Job measured; a Job that two commands followed counts once.

        Args:
            name: of its machine.
            run: what it measured.
        """
        known = self._read()  # another command may have written meanwhile
        others = [one for one in known.get(name, []) if one.key != run.key]
        known[name] = [*others, run][-_MOST_RUNS:]
        oldest = (self._today - timedelta(days=_MOST_DAYS)).isoformat()
        kept = {
            flavor: recent
            for flavor, runs in known.items()
            if (recent := [one for one in runs if one.day >= oldest])
        }
        # Of too many machines those go on which nothing ran for the longest time.
        newest = sorted(kept, key=lambda flavor: max(one.day for one in kept[flavor]))
        self._known = {flavor: kept[flavor] for flavor in newest[-_MOST_FLAVORS:]}
        flavors = {flavor: [asdict(one) for one in runs] for flavor, runs in self._known.items()}
        text = json.dumps({"version": _VERSION, "flavors": flavors}, indent=1)
        fresh = self.path.with_name(f".{self.path.name}-{os.getpid()}")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            fresh.write_text(text, encoding="utf-8")
            os.replace(fresh, self.path)
        except OSError as exc:
            with suppress(OSError):
                fresh.unlink(missing_ok=True)
            self._say(f"warning: the Job's speed is not kept: {exc.strerror}.")

    def _read(self) -> dict[str, list[JobRun]]:
        try:
            if self.path.stat().st_size > _MOST_BYTES:
                raise ValueError("it is too large")
            stored = load_json(self.path.read_bytes(), max_bytes=_MOST_BYTES)
            if not isinstance(stored, dict) or stored.get("version") != _VERSION:
                raise ValueError("it is of another version")
            return {
                flavor: [JobRun.from_dict(run) for run in runs]
                for flavor, runs in stored["flavors"].items()
            }
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as exc:
            why = exc.strerror if isinstance(exc, OSError) else exc
            self._say(
                f"warning: {str(self.path)!r}, the speeds of earlier Jobs, is not read ({why}): "
                "times are estimated from assumed speeds."
            )
            return {}


def in_words(speed: Speed) -> str:
    """Return how fast a machine is, and how that is known, for people."""
    line = f"{format_size(speed.line)}/s each way, {format_duration(speed.start_s)} to start"
    if not speed.runs:
        return f"{line}: assumed, no Job of yours was measured there"
    age = "today" if not speed.days else f"{speed.days} day{'s' * (speed.days > 1)} ago"
    return f"{line}: measured {age} on {speed.runs} run{'s' * (speed.runs > 1)}"


def keep_speed(
    job: "HubJob",
    log: "JobLog",
    job_id: str,
    flavor: str,
    machines: int,
    total_s: float | None,
    say: Callable[[str], None],
) -> None:
    """Keep how fast a Job was that is done; nothing where its log does not tell that.

    Args:
        job: what it did.
        log: of it; what was started again tells no start, and counts for nothing.
        job_id: of it.
        flavor: the name of its machine.
        machines: how many ran it together.
        total_s: from its creation to its end, as the Hub says.
        say: told that the table cannot be read or written.
    """
    known = {one.name: one for one in (*FLAVORS, *([job.offered.flavor] if job.offered else []))}
    if job.work_on is None or log.merged is None or log.attempts > 1 or flavor not in known:
        return
    seconds, read, written = log.merged
    if total_s is None or not read:
        return
    work = job.work_on(known[flavor])
    # What an earlier Job had published was not merged again.
    share = min(max(read, written) / max(work.moved_bytes, 1), 1.0) / machines
    run = JobRun.of(
        job_id,
        start_s=max(total_s - seconds, 0.0),
        seconds=seconds,
        moved_bytes=max(read, written) / machines,
        arithmetic_s=work.arithmetic_s * share,
    )
    Speeds(say=say).add(flavor, run)
