"""The commands: options in, the library's three steps, events out. No arithmetic, no I/O."""

import argparse
import io
import json
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import FrameType

from ..errors import RecipeError, Remedy, ResMergeError, StoppedError
from ..hub.patience import PATIENCE
from ..methods import RECOMMENDED
from ..planning.plan import Plan, RefusedPlan, plan_merge
from ..planning.planned import refused_plan
from ..planning.recipe_file import load_recipe
from ..run.crew import Crew, ToldError, crew_of_launcher
from ..run.group import launched
from ..run.opening import discard_unfinished
from . import console
from .evaluate import evaluate
from .extract import extract
from .lasting_imports import lasting_imports
from .options import publication_of, request_of
from .studies import advise, analyse, compare, show_advice

# What a shell reports of a command that SIGTERM ended, and how long its end may take.
_ENDED, _GRACE_S = 128 + signal.SIGTERM, 8.0


def run_command(args: argparse.Namespace) -> int:
    """Run a command and return its exit code; what is wrong is said in one message."""
    command: str = args.command
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that has no ‖ must not end a merge
    try:
        if launched()[1] > 1 and command != "merge":
            raise RecipeError("only 'merge' runs in several processes. Start this one alone.")
        with _ended_in_words():
            return _COMMANDS[command](args)
    except ToldError as exc:
        return exc.code
    except _EndedError:
        return _ENDED
    except ResMergeError as exc:
        as_json = getattr(args, "json", False) and launched()[0] == 0
        if command == "plan" and as_json and exc.exit_code == 2:
            print(json.dumps(refused_plan(*exc.notices)))
        else:
            console.failed(exc, as_json=as_json)
        return exc.exit_code
    except KeyboardInterrupt:
        if launched()[0] == 0:
            print("interrupted; the same command continues.", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of our output went away (such as `| head`): nothing is left to say to it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if command in ("merge", "demo"):
            print("nobody reads the output; the same command continues.", file=sys.stderr)
            return StoppedError.exit_code
        return 0


class _EndedError(BaseException):
    """SIGTERM came: what Jobs, containers and schedulers send."""


@contextmanager
def _ended_in_words() -> Iterator[None]:
    """End by SIGTERM as by Ctrl-C: in order, within seconds; of several processes the crew does."""
    if launched()[1] > 1 or threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(signum: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        # A raw write: the signal may have come in the middle of another one.
        os.write(2, b"ended by SIGTERM; finished shards are kept, the same command continues.\n")
        # Whatever holds the end up, such as a large matrix in work, it is not waited for.
        timer = threading.Timer(_GRACE_S, os._exit, (_ENDED,))
        timer.daemon = True
        timer.start()
        raise _EndedError

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)


def _plan_of(args: argparse.Namespace) -> Plan | RefusedPlan:
    asked = request_of(args)
    return plan_merge(
        asked.recipe,
        asked.options,
        out=args.out,
        publication=asked.publication,
        work_dir=args.work_dir,
    )


def _plan(args: argparse.Namespace) -> int:
    plan = _plan_of(args)
    advice = advise(plan, args.sample) if args.advice and isinstance(plan, Plan) else None
    if args.json:
        print(json.dumps(plan.to_dict() | ({"advice": advice} if advice else {})))
        return 2 if plan.refused else 0
    console.show_plan(plan)
    if advice:
        show_advice(advice)
    return 2 if plan.refused else 0


def _merge(args: argparse.Namespace) -> int:
    if not args.out and not args.push_to:
        raise RecipeError("nowhere to write.", Remedy.GIVE_TARGET)
    with crew_of_launcher() as crew:
        if args.discard_staging:
            with crew.main_first("discard"):
                if crew.is_main:
                    console.discarded(
                        discard_unfinished(args.out, publication_of(args), args.work_dir)
                    )
        return _run(_plan_of(args), args.out, args.work_dir, as_json=args.json, crew=crew)


def _run(
    plan: Plan | RefusedPlan,
    out: str | None,
    work_dir: str | None,
    *,
    as_json: bool,
    crew: Crew | None = None,
) -> int:
    plan = plan.accepted()
    with lasting_imports():
        from ..run.engine import run_merge

    events = run_merge(plan, out=out, work_dir=work_dir, crew=crew)
    is_silent = crew is not None and not crew.is_main
    if not (is_silent or as_json or sys.stderr.isatty()):
        PATIENCE.tell = console.say  # on a terminal the bar says it
    show = console.nothing if is_silent else console.print_json if as_json else console.follow
    try:
        show(events)
    finally:
        events.close()  # type: ignore[attr-defined]  # a generator; closing it cancels
        plan.close()
    return 0


def _verify(args: argparse.Namespace) -> int:
    from ..run.verify_hub import verify_merge

    recipe = load_recipe(args.recipe) if args.recipe else None
    if args.sample < 0:
        raise RecipeError(f"--sample must be 0 or more tensors, not {args.sample}.")
    checks = verify_merge(args.merged, recipe=recipe, sample=args.sample)
    return 0 if console.show_checks(checks, as_json=args.json) else 2


def _submit(args: argparse.Namespace) -> int:
    # Packing this tool as a wheel is nothing that other commands wait for.
    from .submit import submit

    return submit(args)


def _methods(args: argparse.Namespace) -> int:
    from ..methods import describe_methods

    if args.json:
        print(json.dumps(describe_methods()))
    else:
        console.show_methods(describe_methods())
    return 0


def _demo(args: argparse.Namespace) -> int:
    from ..experts.group import built_in_recipe, demo_accuracies, merged_otherwise
    from ..run.verify import verify_folder

    if args.prompts < 0:
        raise RecipeError(f"--prompts must be 0 or more prompts a task, not {args.prompts}.")
    recipe = replace(built_in_recipe(lora=args.lora), method=RECOMMENDED)
    plan = plan_merge(recipe, out=args.out)
    _run(plan, args.out, None, as_json=args.json)
    passed = console.show_checks(verify_folder(args.out, recipe=recipe), as_json=args.json)
    if args.prompts:
        with tempfile.TemporaryDirectory() as folder:
            console.say("merging them by other methods as well, to compare")
            merges = {RECOMMENDED: args.out, **merged_otherwise(Path(folder), recipe)}
            console.say(f"asking every model {args.prompts} held-out prompts a task")
            accuracies = demo_accuracies(merges, args.prompts, say=console.say)
        console.show_accuracies(accuracies, as_json=args.json)
    return 0 if passed else 2


_COMMANDS: Mapping[str, Callable[[argparse.Namespace], int]] = {
    "plan": _plan,
    "merge": _merge,
    "verify": _verify,
    "compare": compare,
    "analyse": lambda args: analyse(args, _run),
    "extract": lambda args: extract(args, _run),
    "evaluate": evaluate,
    "submit": _submit,
    "methods": _methods,
    "demo": _demo,
}
