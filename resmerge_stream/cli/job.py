"""A Job from its price to its end: choose a machine, ask, start, show its log, say how it ended."""

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..errors import JobRefusedError, RecipeError, StoppedError, listed
from ..hub.flavors import Flavor
from ..pipes import heard
from ..planning.machines import Estimate, ranked, timeout_for
from ..units import dollars, duration
from . import console
from .submission import MOUNT, JobFiles, JobLog, job_command

if TYPE_CHECKING:
    from ..hub.jobs import HubJobs


@dataclass(frozen=True, slots=True)
class Errand:
    """What a Job is to do.

    Attributes:
        what: a word for it, such as ``merge``.
        summary: a line that says how much it is.
        told: of it in the event ``offered``.
        labels: that tell it from others.
        seconds_on: what it takes on a machine, once it has begun.
        lack_of: what a machine lacks for it, or an empty string.
        commands: of this package; they put their files among those given.
        needs: what is installed beside the package.
    """

    what: str
    summary: str
    told: Mapping[str, Any]
    labels: Mapping[str, str]
    seconds_on: Callable[[Flavor], float]
    lack_of: Callable[[Flavor], str]
    commands: Callable[[JobFiles], Sequence[Sequence[str]]]
    needs: Sequence[str] = field(default=())


def run_errand(jobs: "HubJobs", errand: Errand, args: argparse.Namespace, show: "Show") -> int:
    """Start a Job when its price is agreed to, follow it, and return the exit code it calls for.

    Args:
        jobs: of the namespace that pays.
        errand: what it is to do.
        args: with ``flavor``, ``timeout`` and ``yes``.
        show: where to say what happens.

    Raises:
        ResMergeError: it was refused, or could not be followed.
    """
    timeout = duration(args.timeout) if args.timeout else None
    chosen = _choose(errand, jobs.flavors(), args.flavor)
    seconds = timeout or timeout_for(chosen.seconds)
    _ask(_offer(errand, chosen, seconds, show), yes=args.yes)
    files = JobFiles()
    command = job_command(errand.commands(files), files, chosen.flavor, errand.needs)
    started = jobs.start(
        command,
        labels=errand.labels,
        flavor=chosen.flavor.name,
        timeout=seconds,
        volume=jobs.upload(files.contents, mount=MOUNT),
    )
    show.event("started", job=f"{jobs.namespace}/{started}", url=jobs.page(started))
    show.say(f"started {jobs.page(started)}; its log follows, Ctrl-C leaves it running.")
    return follow(jobs, started, show)


def _choose(errand: Errand, flavors: tuple[Flavor, ...], name: str | None) -> Estimate:
    """Return the machine that was asked for, or the cheapest that the errand fits."""
    known = {flavor.name: flavor for flavor in flavors}
    if name is not None:
        if name not in known:
            raise RecipeError(
                f"--flavor {name!r} is none of the Hub's machines: {listed(known, limit=40)}."
            )
        if lack := errand.lack_of(known[name]):
            raise RecipeError(f"--flavor {name} does not do: {lack}. Leave it out to choose.")
        return ranked([known[name]], errand.seconds_on, errand.lack_of)[0]
    best = ranked(flavors, errand.seconds_on, errand.lack_of)[0]
    if not best.fits:
        largest = max(flavors, key=lambda it: (it.gpu_gb / it.gpus, it.memory_gb))
        raise RecipeError(
            f"no machine of the Hub fits this {errand.what}: on {largest.name}, "
            f"{errand.lack_of(largest)}."
        )
    return best


def _offer(errand: Errand, chosen: Estimate, timeout: int, show: "Show") -> str:
    """Say what the Job will take and cost, and return the question."""
    flavor, most = chosen.flavor, chosen.flavor.price(timeout)
    gpu = f", {flavor.gpu_gb:g} GB of GPU memory" if flavor.gpu_gb else ""
    show.event(
        "offered",
        flavor=flavor.name,
        seconds_estimate=round(chosen.seconds),
        usd_estimate=round(chosen.price, 4),
        timeout_seconds=timeout,
        usd_at_most=round(most, 4),
        **errand.told,
    )
    show.say(
        f"{errand.summary}\n"
        f"machine:  {flavor.name}: {flavor.vcpu} vCPU, {flavor.memory_gb:g} GB of memory, "
        f"{flavor.disk_gb:g} GB of disk{gpu}, {dollars(flavor.usd_hour)} an hour\n"
        f"time:     about {_minutes(chosen.seconds)}, ended after {_minutes(timeout)}\n"
        f"price:    about {dollars(chosen.price)}, at most {dollars(most)}"
    )
    if timeout < chosen.seconds:
        show.say("warning: the timeout is shorter than the estimate; a stopped Job can be resumed.")
    return f"Start this Job for about {dollars(chosen.price)}? [y/N] "


def _ask(question: str, *, yes: bool) -> None:
    """Return when the answer is yes.

    Raises:
        RecipeError: nobody can answer.
        JobRefusedError: the answer is another.
    """
    if yes:
        return
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        raise RecipeError("a Job costs money and nobody can be asked here: give --yes to start it.")
    print(question, end="", file=sys.stderr, flush=True)
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise JobRefusedError("nothing was started.")


def attach(reference: str, show: "Show") -> int:
    """Follow a Job that runs or ran; ``JOB_ID`` or ``NAMESPACE/JOB_ID``.

    Raises:
        ResMergeError: there is no such Job, or it could not be followed.
    """
    from ..hub.jobs import HubJobs

    namespace, _, job_id = reference.rpartition("/")
    return follow(HubJobs(None, namespace or None), job_id, show)


def follow(jobs: "HubJobs", job_id: str, show: "Show") -> int:
    """Show a Job's log until its end; return the exit code that its end calls for."""
    reference, log = f"{jobs.namespace}/{job_id}", JobLog()
    goes_on = (
        f"the Job goes on. Follow it again: resmerge-stream submit --attach {reference}\n"
        f"Cancel it: hf jobs cancel {reference}"
    )
    try:
        _show_log(jobs.log(job_id), log, show)
        stage, message = jobs.ending(job_id)
        if log.exit_code is None:
            _show_log(jobs.rest(job_id, log.lines), log, show)
    except KeyboardInterrupt:
        show.say(f"\n{goes_on}")
        return 130
    except StoppedError as exc:
        raise StoppedError(f"{exc} Meanwhile {goes_on}") from exc
    code, text = log.ending(stage, message)
    show.event("ended", job=reference, stage=stage, exit_code=code, message=text)
    show.say(text)
    return code


def _show_log(lines: Iterable[str], log: JobLog, show: "Show") -> None:
    for line in heard(lines):
        log.read(line)
        show.line(line)


class Show:
    """Words for people on standard error, the Job's log or JSON on standard output."""

    def __init__(self, *, as_json: bool) -> None:
        self.as_json = as_json

    def say(self, text: str) -> None:
        """Say something to people."""
        console.say(text)

    def line(self, text: str) -> None:
        """Show a line of a Job's log."""
        if self.as_json:
            self.event("log", line=text)
        else:
            print(console.plain(text), flush=True)

    def event(self, name: str, **values: Any) -> None:
        """Tell programs that something happened."""
        if self.as_json:
            print(json.dumps({"event": name, **values}), flush=True)


def _minutes(seconds: float) -> str:
    hours, minutes = divmod(max(round(seconds / 60), 1), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"
