"""A Job on the Hub: what it is to do, the machine it is offered, its start, how it ended.

No token: a Job gets that as a secret, beside its command.
"""

from __future__ import annotations

import hashlib
import os
import re
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Self

from ..errors import PlanRefusedError, RecipeError, listed
from ..hub.flavors import Flavor
from ..planning.machines import FLEETS, Estimate, Fleet, Speed, Work, assumed, ranked, timeout_for
from ..units import parse_size
from .fleet import start_fleet
from .wheel import WHEEL_NAME, build_wheel

if TYPE_CHECKING:
    from ..hub.jobs import HubJobs

# Where the Job finds its files.
MOUNT = "/resmerge"
# Reports how it ended, whoever ends the log; "$@" keeps every argument as it is.
_WRAPPER = '"$@"{then}; code=$?; echo "resmerge-stream job: exit code $code"; exit $code'
_EXIT = re.compile(r"resmerge-stream job: exit code (\d+)")
# What a merge says at its end.
_MERGED = re.compile(r"merged into .* in (\d+\.\d) s, (\S+ \w+) read, (\S+ \w+) written, .*")
# How lines begin that no installer writes.
_OURS = ("resmerge-stream: ", "merging: ", "merged into ")
_NOT_IN_LABELS = re.compile(r"[^A-Za-z0-9_-]+")


@dataclass(frozen=True, slots=True)
class HubJob:
    """A Job, from what it is asked to do to what the Hub is asked to start.

    Attributes:
        what: a word for it, such as ``merge``.
        summary: lines that say how much it is.
        told: of it in the event ``offered``.
        labels: that tell it from others.
        commands: of this package, run until one fails.
        files: what they read, by path; a path names its content, so that never changes.
        seconds_on: what it takes on a machine of a speed, once it has begun.
        lack_of: what a machine lacks for it, or an empty string.
        needs: what is installed beside the package.
        fleet_on: what it takes on several machines; None where one does all.
        most_machines: on which it can run at once.
        work_on: bytes over the line and seconds of arithmetic on a machine, from which its speed
            is known afterwards; None where that would tell nothing.
        offered: the machine for it, from `on`; None as long as none was chosen.
        speed: of that machine.
        machines: how many of them, each with a Job of its own.
        attempts: how often the Hub starts a Job in all, where it fails.
        timeout_s: after which the Hub ends it.
    """

    what: str
    summary: str
    told: Mapping[str, Any]
    labels: Mapping[str, str]
    commands: Sequence[Sequence[str]]
    files: Mapping[str, bytes]
    seconds_on: Callable[[Flavor, Speed], float]
    lack_of: Callable[[Flavor], str]
    needs: Sequence[str] = field(default=())
    fleet_on: Callable[[Flavor, Speed, int], Fleet] | None = None
    most_machines: int = 1
    work_on: Callable[[Flavor], Work] | None = None
    offered: Estimate | None = None
    speed: Speed | None = None
    machines: int = 1
    attempts: int = 1
    timeout_s: int = 0

    def then(self, other: HubJob) -> Self:
        """Return a Job that does this, then another; no machine is offered for it yet."""
        return replace(
            self,
            what=f"{self.what} and its {other.what}",
            summary=f"{self.summary}\n{other.summary}",
            told={**self.told, **other.told},
            labels={**other.labels, **self.labels},
            commands=(*self.commands, *other.commands),
            files={**self.files, **other.files},
            seconds_on=lambda *on: self.seconds_on(*on) + other.seconds_on(*on),
            lack_of=lambda flavor: self.lack_of(flavor) or other.lack_of(flavor),
            needs=(*self.needs, *other.needs),
            fleet_on=None,
            most_machines=1,
            work_on=None,
            offered=None,
            timeout_s=0,
        )

    def on(
        self,
        flavors: Sequence[Flavor],
        timeout_s: int | None = None,
        *,
        machines: int = 1,
        attempts: int = 1,
        speed_of: Callable[[Flavor], Speed] = assumed,
    ) -> Self:
        """Return it with the cheapest machine that it fits, or so many of that kind.

        Args:
            flavors: the machines.
            timeout_s: after which the Job ends; None: three times what it takes, and half an hour
                at least.
            machines: how many, each with a Job of its own.
            attempts: how often the Hub starts a Job in all, where it fails.
            speed_of: how fast a machine is.

        Raises:
            RecipeError: it fits none, or not so many have something to do.
        """
        best = ranked(flavors, self.seconds_on, self.lack_of, speed_of)[0]
        if not best.fits:
            largest = max(flavors, key=lambda it: (it.gpu_gb / it.gpus, it.memory_gb))
            raise RecipeError(
                f"no machine of the Hub fits this {self.what}: on {largest.name}, "
                f"{self.lack_of(largest)}."
            )
        speed = speed_of(best.flavor)
        if machines > 1:
            if self.fleet_on is None:
                raise RecipeError(f"one machine does a whole {self.what}: several have no part.")
            if machines > self.most_machines:
                raise RecipeError(
                    f"{machines} machines: the merge has {self.most_machines} file(s), and each is "
                    "made by one machine. Ask for fewer machines, or for smaller files."
                )
            shared = self.fleet_on(best.flavor, speed, machines)
            best = best._replace(seconds=shared.seconds, price=shared.price)
        return replace(
            self,
            offered=best,
            speed=speed,
            machines=machines,
            attempts=attempts,
            timeout_s=timeout_s or timeout_for(best.seconds),
        )

    def offer(self) -> dict[str, Any]:
        """Return as plain data what it takes and costs on the machine that is offered."""
        flavor, _, seconds, price = self.machine
        return {
            "flavor": flavor.name,
            "seconds_estimate": round(seconds),
            "usd_estimate": round(price, 4),
            "timeout_seconds": self.timeout_s,
            "usd_at_most": round(self.most, 4),
        }

    def choices(self) -> list[Fleet]:
        """Return what it takes on 1, 2, 4, 8 and 16 of its machines, as many as have a part."""
        if self.fleet_on is None or self.speed is None:
            return []
        counts = [count for count in FLEETS if count <= max(self.most_machines, 1)]
        return [self.fleet_on(self.machine.flavor, self.speed, count) for count in counts]

    @property
    def most(self) -> float:
        """Dollars that it costs at most: should each attempt of each Job take all of its time."""
        return self.machines * self.attempts * self.machine.flavor.price(self.timeout_s)

    def start(self, hub: HubJobs) -> str:
        """Start it on the machines that somebody agreed to pay for, and return the id to follow.

        It installs the package with uv. torch comes without CUDA where there is no GPU: a tenth of
        the download.

        Args:
            hub: the Jobs of the namespace that pays.

        Raises:
            JobRefusedError: the Hub starts none for this account.
            PublishError: its files cannot be sent.
        """
        flavor, files = self.machine.flavor, dict(self.files)
        start = [
            *("uv", "tool", "run", "--python", "3.12"),
            *("--torch-backend", "auto" if flavor.gpu_gb else "cpu"),
            *(word for need in self.needs for word in ("--with", need)),
            *("--from", put(files, "wheels", WHEEL_NAME, build_wheel()), "resmerge-stream"),
        ]
        first, *others = ([*start, *words] for words in self.commands)
        then = "".join(f" && {shlex.join(words)}" for words in others)
        script = _WRAPPER.replace("{then}", then)
        how: dict[str, Any] = {
            "labels": self.labels,
            "flavor": flavor.name,
            "timeout": self.timeout_s,
            "attempts": self.attempts,
            "volume": hub.upload(files, mount=MOUNT),
        }
        if self.machines > 1:
            return start_fleet(hub, script, first, self.machines, **how)
        return hub.start(["sh", "-c", script, "sh", *first], **how)

    @property
    def machine(self) -> Estimate:
        """What it takes on the machine that is offered for it."""
        if self.offered is None:
            raise RuntimeError("no machine was offered for this Job yet")
        return self.offered


def put(files: dict[str, bytes], room: str, name: str, data: bytes) -> str:
    """Add a file to those that a Job is given, and return where the Job sees it."""
    path = f"{room}/{digest(data)}/{name}"
    files[path] = data
    return f"{MOUNT}/{path}"


def labels_of(name: str, target: str) -> dict[str, str]:
    """Return the labels of whatever a Job does for a repository."""
    return {
        "name": f"{name}-{_NOT_IN_LABELS.sub('-', target.partition('/')[2])}"[:100],
        "resmerge-target": digest(target.encode()),
    }


def digest(data: bytes) -> str:
    """Return what names a content among a Job's files and labels."""
    return hashlib.sha256(data).hexdigest()[:16]


def refuse_folders(names: Iterable[str]) -> None:
    """Refuse models on this machine: a Job cannot see them.

    Raises:
        PlanRefusedError: one is a folder here.
    """
    folders = [name for name in names if os.path.isdir(os.path.expanduser(name))]
    if folders:
        raise PlanRefusedError(
            f"a Job runs on the Hub and cannot see folders of this machine: {listed(folders)}. "
            "Push them to the Hub first and name the repositories, or run it here, not as a Job."
        )


@dataclass(slots=True)
class JobLog:
    """What a Job's log has told of its end; `cli.job.ending` says what that calls for.

    Attributes:
        lines: how many there were.
        exit_code: of the command, or of its installation; None as long as it is not known.
        began: whether the command itself said something.
        traceback: whether a bug showed itself.
        attempts: how many there were; what else is told is of the last one.
        merged: seconds, bytes read and bytes written of a merge that was published.
    """

    lines: int = 0
    exit_code: int | None = None
    began: bool = False
    traceback: bool = False
    attempts: int = 1
    merged: tuple[float, int, int] | None = None

    def read(self, line: str) -> None:
        """Take a line of the log."""
        self.lines += 1
        if match := _EXIT.fullmatch(line.strip()):
            self.exit_code = int(match[1])
        elif line.startswith(_OURS):
            if self.exit_code is not None:  # the Hub started it again
                self.exit_code, self.traceback = None, False
                self.attempts += 1
            self.began = True
            if match := _MERGED.fullmatch(line.rstrip()):
                self.merged = (float(match[1]), parse_size(match[2]), parse_size(match[3]))
        elif line.startswith("Traceback (most recent call last)"):
            self.traceback = True
