"""The command ``submit``: plan here, choose a machine, ask, start a Job, follow it."""

import argparse
import json
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from ..errors import JobRefusedError, RecipeError, StoppedError, listed
from ..hub.flavors import Flavor
from ..pipes import heard
from ..planning.machines import Estimate, estimates, largest, shortage, timeout_for
from ..planning.plan import Plan, plan_merge
from ..units import dollars, duration, format_size
from . import console
from .options import request_of
from .submission import MOUNT, JobLog, job_command, job_files, job_labels, refuse_folders

if TYPE_CHECKING:
    from ..hub.jobs import HubJobs


def submit(args: argparse.Namespace) -> int:
    """Run the command and return its exit code.

    Raises:
        ResMergeError: it was refused, or could not be followed.
    """
    show = _Show(as_json=args.json)
    if args.attach:
        return _attach(args.attach, show)
    if not args.push_to:
        raise RecipeError("a Job publishes its result: give --push-to NAMESPACE/NAME.")
    timeout = duration(args.timeout) if args.timeout else None
    plan = _plan(args)
    try:
        return _submit(args, plan, timeout, show)
    finally:
        plan.close()


def _plan(args: argparse.Namespace) -> Plan:
    asked = request_of(args)
    refuse_folders(asked)
    plan = plan_merge(
        asked.recipe,
        asked.options,
        publication=asked.publication,
        work_dir=args.work_dir,
        machine=largest(),
    )
    return plan.accepted()


def _submit(args: argparse.Namespace, plan: Plan, timeout: int | None, show: "_Show") -> int:
    from ..hub.jobs import HubJobs

    if plan.target is None:
        raise RuntimeError("a plan with a publication has a target")
    if plan.target.finished:
        return _finish_here(plan, show)
    jobs, labels = HubJobs(plan.token, str(plan.target.account["name"])), job_labels(plan)
    if running := jobs.find(labels):
        show.say(f"this merge already runs as {jobs.page(running)}; following it.")
        return _follow(jobs, running, show)
    for warning in plan.warnings:
        show.say(f"warning: {warning}")
    chosen = _choose(plan, jobs.flavors(), args.flavor)
    seconds = timeout or timeout_for(chosen.seconds)
    _ask(_offer(plan, chosen, seconds, show), yes=args.yes)
    files = job_files(plan.recipe)
    started = jobs.start(
        job_command(plan.request, files, chosen.flavor),
        labels=labels,
        flavor=chosen.flavor.name,
        timeout=seconds,
        volume=jobs.upload(files.contents, mount=MOUNT),
    )
    show.event("started", job=f"{jobs.namespace}/{started}", url=jobs.page(started))
    show.say(f"started {jobs.page(started)}; its log follows, Ctrl-C leaves it running.")
    return _follow(jobs, started, show)


def _finish_here(plan: Plan, show: "_Show") -> int:
    """Do what a run that was killed at its very end had no time for; nothing is merged."""
    from ..run.engine import run_merge

    events = run_merge(plan)
    (console.print_json if show.as_json else console.follow)(events)
    return 0


def _choose(plan: Plan, flavors: tuple[Flavor, ...], name: str | None) -> Estimate:
    """Return the machine that was asked for, or the cheapest that the plan fits."""
    known = {flavor.name: flavor for flavor in flavors}
    if name is not None:
        if name not in known:
            raise RecipeError(
                f"--flavor {name!r} is none of the Hub's machines: {listed(known, limit=40)}."
            )
        if lack := shortage(plan, known[name]):
            raise RecipeError(f"--flavor {name} does not do: {lack}. Leave it out to choose.")
        return estimates(plan, [known[name]])[0]
    best = estimates(plan, flavors)[0]
    if not best.fits:
        raise RecipeError(
            f"no machine of the Hub fits this merge: on {best.flavor.name}, "
            f"{shortage(plan, best.flavor)}."
        )
    return best


def _offer(plan: Plan, chosen: Estimate, timeout: int, show: "_Show") -> str:
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
        plan_hash=plan.plan_hash,
    )
    show.say(
        f"plan {plan.plan_hash}: {len(plan.tensors)} tensors, {format_size(plan.read_bytes)} to "
        f"read, {format_size(plan.write_bytes)} to publish\n"
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


def _attach(reference: str, show: "_Show") -> int:
    from ..hub.jobs import HubJobs

    namespace, _, job_id = reference.rpartition("/")
    return _follow(HubJobs(None, namespace or None), job_id, show)


def _follow(jobs: "HubJobs", job_id: str, show: "_Show") -> int:
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


def _show_log(lines: Iterable[str], log: JobLog, show: "_Show") -> None:
    for line in heard(lines):
        log.read(line)
        show.line(line)


class _Show:
    """Words for people on standard error, the Job's log or JSON on standard output."""

    def __init__(self, *, as_json: bool) -> None:
        self.as_json = as_json

    def say(self, text: str) -> None:
        console.say(text)

    def line(self, text: str) -> None:
        if self.as_json:
            self.event("log", line=text)
        else:
            print(console.plain(text), flush=True)

    def event(self, name: str, **values: Any) -> None:
        if self.as_json:
            print(json.dumps({"event": name, **values}), flush=True)


def _minutes(seconds: float) -> str:
    hours, minutes = divmod(max(round(seconds / 60), 1), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"
