"""A Job from its price to its end, in a terminal: ask, start, show its log, say how it ended."""

import argparse
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from ..errors import JobRefusedError, RecipeError, StoppedError, listed
from ..jobs.fleet import end_others, machines_of
from ..jobs.job import HubJob, JobLog
from ..jobs.speeds import Speeds, in_words, keep_speed
from ..pipes import heard
from ..planning.machines import Fleet, assumed, worthwhile
from ..units import dollars, duration, format_duration
from . import console

if TYPE_CHECKING:
    from ..hub.jobs import HubJobs

# Jobs that run together are each started so often where nothing else was asked for: a machine that
# is lost ends the others too, and all go on from what is published.
_ATTEMPTS = 3
_MOST_MACHINES, _MOST_ATTEMPTS = 64, 10


def run_job(hub: "HubJobs", job: HubJob, args: argparse.Namespace, show: "Show") -> int:
    """Start a Job when its price is agreed to, follow it, and return the exit code it calls for.

    Args:
        hub: the Jobs of the namespace that pays.
        job: what it is to do.
        args: with ``flavor``, ``timeout`` and ``yes``; ``machines`` and ``attempts`` where several
            can do it.
        show: where to say what happens.

    Raises:
        ResMergeError: it was refused, or could not be followed.
    """
    timeout = duration(args.timeout) if args.timeout else None
    flavors = hub.flavors()
    if args.flavor is not None:
        known = {flavor.name: flavor for flavor in flavors}
        if args.flavor not in known:
            raise RecipeError(
                f"--flavor {args.flavor!r} is not one of the Hub's machines: "
                f"{listed(known, limit=40)}."
            )
        if lack := job.lack_of(known[args.flavor]):
            raise RecipeError(
                f"--flavor {args.flavor} does not fit: {lack}. Leave it out to get the cheapest "
                "that fits."
            )
        flavors = (known[args.flavor],)
    speeds = Speeds(say=show.say)
    asked = machines_asked(args)
    job = job.on(flavors, timeout, speed_of=speeds.of)
    choices = job.choices() if asked is None else []
    machines = asked or (worthwhile(choices).machines if choices else 1)
    attempts = attempts_asked(args) or (_ATTEMPTS if machines > 1 else 1)
    job = job.on(
        [job.machine.flavor], timeout, machines=machines, attempts=attempts, speed_of=speeds.of
    )
    _ask(_shown(job, choices, show), yes=args.yes)
    started = job.start(hub)
    show.event("started", job=f"{hub.namespace}/{started}", url=hub.page(started))
    others = f", with {machines - 1} more" if machines > 1 else ""
    show.say(f"started {hub.page(started)}{others}; its log follows, Ctrl-C leaves it running.")
    return follow(hub, started, show, job)


def machines_asked(args: argparse.Namespace) -> int | None:
    """Return how many machines were asked for; None where the estimate is to choose.

    Raises:
        RecipeError: it is no such number.
    """
    text = getattr(args, "machines", "1")
    return None if text == "auto" else _number(text, "--machines", _MOST_MACHINES, " or auto")


def attempts_asked(args: argparse.Namespace) -> int | None:
    """Return how often a Job may be started in all; None where nothing was asked.

    Raises:
        RecipeError: it is no such number.
    """
    text = getattr(args, "attempts", None)
    return None if text is None else _number(text, "--attempts", _MOST_ATTEMPTS)


def _number(text: str, name: str, most: int, other: str = "") -> int:
    if not text.isdecimal() or not 1 <= int(text) <= most:
        raise RecipeError(f"{name} {text!r} is not a number from 1 to {most}{other}.")
    return int(text)


def _shown(job: HubJob, choices: Sequence[Fleet], show: "Show") -> str:
    """Say what the Job will take and cost, and return the question."""
    flavor, _, seconds, price = job.machine
    gpu = f", {flavor.gpu_gb:g} GB of GPU memory" if flavor.gpu_gb else ""
    several, speed = job.machines > 1, job.speed or assumed(flavor)
    count, each = (f"{job.machines} × ", " each") if several else ("", "")
    show.event(
        "offered",
        **job.offer(),
        machines=job.machines,
        attempts=job.attempts,
        line_bytes_s=round(speed.line),
        measured_runs=speed.runs,
        **({"choices": [choice._asdict() for choice in choices]} if choices else {}),
        **job.told,
    )
    lines = [
        job.summary,
        f"machine:  {count}{flavor.name}: {flavor.vcpu} vCPU, {flavor.memory_gb:g} GB of memory, "
        f"{flavor.disk_gb:g} GB of disk{gpu}, {dollars(flavor.usd_hour)} an hour{each}",
        f"speed:    {in_words(speed)}",
    ]
    if choices:
        lines += [f"{'':10}{'machines':10}{'time':14}{'price':10}waits for"]
        lines += [
            f"{'':10}{choice.machines:<10}{format_duration(choice.seconds):14}"
            f"{dollars(choice.price):10}{choice.limit}"
            for choice in choices
        ]
    again = f", started {job.attempts} times at most" if job.attempts > 1 else ""
    lines += [
        f"time:     about {format_duration(seconds)}, "
        f"ended after {format_duration(job.timeout_s)}{again}",
        f"price:    about {dollars(price)}{' for all' if several else ''}, "
        f"at most {dollars(job.most)}",
    ]
    show.say("\n".join(lines))
    if job.timeout_s < seconds:
        show.say("warning: the timeout is shorter than the estimate; a stopped Job can be resumed.")
    which = f"these {job.machines} Jobs" if several else "this Job"
    return f"Start {which} for about {dollars(price)}? [y/N] "


def _ask(question: str, *, yes: bool) -> None:
    """Return when the answer is yes.

    Raises:
        RecipeError: nobody can answer.
        JobRefusedError: the answer is another.
    """
    if yes:
        return
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        raise RecipeError(
            "starting a Job costs money: add --yes to confirm, as there is no terminal to ask in."
        )
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


def follow(hub: "HubJobs", job_id: str, show: "Show", job: HubJob | None = None) -> int:
    """Show a Job's log until its end; return the exit code that its end calls for.

    Args:
        hub: the Jobs of its namespace.
        job_id: of the Job; of the first of several that run together.
        show: where to show it.
        job: what it does, where that is known: how fast it was is kept for the next estimate.

    Raises:
        ResMergeError: there is no such Job, or it could not be followed.
    """
    reference, log = f"{hub.namespace}/{job_id}", JobLog()
    goes_on = (
        f"the Job goes on. Follow it again: resmerge-stream submit --attach {reference}\n"
        f"Cancel it: hf jobs cancel {reference}"
    )
    try:
        _show_log(hub.log(job_id), log, show)
        ended = hub.ending(job_id)
        if log.exit_code is None:
            _show_log(hub.rest(job_id, log.lines), log, show)
        end_others(hub, ended, show.say)
    except KeyboardInterrupt:
        show.say(f"\n{goes_on}")
        return 130
    except StoppedError as exc:
        raise StoppedError(f"{exc} Meanwhile {goes_on}") from exc
    stage = str(ended.status.stage)
    code, text = ending(log, stage, ended.status.message)
    if job is not None and stage == "COMPLETED" and ended.durations is not None:
        seconds = ended.durations.total_secs
        keep_speed(job, log, job_id, str(ended.flavor), machines_of(ended), seconds, show.say)
    show.event("ended", job=reference, stage=stage, exit_code=code, message=text)
    show.say(text)
    return code


def ending(log: JobLog, stage: str, message: str | None) -> tuple[int, str]:
    """Return the exit code that a Job's end calls for, and what to say of it.

    Args:
        log: of the Job.
        stage: the Hub's word for the Job's state.
        message: the Hub's reason, where it gives one.
    """
    again = "The same command starts it again; what is published is kept."
    why = f" ({' '.join(message.split())[:200]})" if message else ""
    if stage == "COMPLETED":
        return 0, "the Job is done."
    if stage in ("CANCELED", "DELETED"):
        return 3, f"the Job was cancelled{why}. {again}"
    if log.exit_code == 2 and log.began:
        return 2, "it was refused in the Job; its log above says why."
    if log.exit_code == 1 and log.traceback:
        return 1, "it failed in the Job: a bug. Its log above has the traceback."
    if log.exit_code == 137:
        return 3, (
            f"the Job was killed, most likely for its memory{why}. Give a larger --flavor, or "
            f"merge with a smaller --memory-budget. {again}"
        )
    if log.exit_code is not None and not log.began:
        return (
            3,
            f"the Job ended before it began; its log above says why{why}. {again}",
        )
    if log.exit_code is None:
        return 3, (
            f"the Job was stopped{why}: its time was up, or its machine failed. {again} "
            "--timeout gives it more time."
        )
    return 3, f"it stopped in the Job; its log above says why{why}. {again}"


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
            print(text, flush=True)

    def event(self, name: str, **values: Any) -> None:
        """Tell programs that something happened."""
        if self.as_json:
            console.tell({"event": name, **values})
