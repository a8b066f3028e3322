"""A Job from its price to its end, in a terminal: ask, start, show its log, say how it ended."""

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from ..errors import JobRefusedError, RecipeError, StoppedError, listed
from ..hub.flavors import Flavor
from ..jobs.errand import Errand, Offer, offer, start
from ..pipes import heard
from ..units import dollars, duration
from . import console
from .job_log import JobLog

if TYPE_CHECKING:
    from ..hub.jobs import HubJobs


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
    flavors = jobs.flavors()
    if args.flavor is not None:
        flavors = (_named(args.flavor, flavors, errand),)
    taken = offer(errand, flavors, timeout)
    _ask(_shown(errand, taken, show), yes=args.yes)
    started = start(jobs, errand, taken)
    show.event("started", job=f"{jobs.namespace}/{started}", url=jobs.page(started))
    show.say(f"started {jobs.page(started)}; its log follows, Ctrl-C leaves it running.")
    return follow(jobs, started, show)


def _named(name: str, flavors: Sequence[Flavor], errand: Errand) -> Flavor:
    """Return the machine that was asked for, where the errand fits it."""
    known = {flavor.name: flavor for flavor in flavors}
    if name not in known:
        raise RecipeError(
            f"--flavor {name!r} is not one of the Hub's machines: {listed(known, limit=40)}."
        )
    if lack := errand.lack_of(known[name]):
        raise RecipeError(
            f"--flavor {name} does not fit: {lack}. Leave it out to get the cheapest that fits."
        )
    return known[name]


def _shown(errand: Errand, taken: Offer, show: "Show") -> str:
    """Say what the Job will take and cost, and return the question."""
    chosen, flavor = taken.estimate, taken.estimate.flavor
    gpu = f", {flavor.gpu_gb:g} GB of GPU memory" if flavor.gpu_gb else ""
    show.event(
        "offered",
        flavor=flavor.name,
        seconds_estimate=round(chosen.seconds),
        usd_estimate=round(chosen.price, 4),
        timeout_seconds=taken.timeout_s,
        usd_at_most=round(taken.most, 4),
        **errand.told,
    )
    show.say(
        f"{errand.summary}\n"
        f"machine:  {flavor.name}: {flavor.vcpu} vCPU, {flavor.memory_gb:g} GB of memory, "
        f"{flavor.disk_gb:g} GB of disk{gpu}, {dollars(flavor.usd_hour)} an hour\n"
        f"time:     about {_minutes(chosen.seconds)}, ended after {_minutes(taken.timeout_s)}\n"
        f"price:    about {dollars(chosen.price)}, at most {dollars(taken.most)}"
    )
    if taken.timeout_s < chosen.seconds:
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
