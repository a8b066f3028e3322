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
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from types import FrameType
from typing import TextIO, cast

from ..errors import RecipeError, Remedy, ResMergeError, StoppedError, system_errors
from ..hub.patience import PATIENCE
from ..planning.plan import Plan, RefusedPlan, plan_merge
from ..planning.planned import refused_plan
from ..planning.recipe_file import load_recipe
from ..planning.recipe_places import recipe_at
from ..recipe import relocated
from ..run.group import launched
from ..run.opening import discard_unfinished
from ..run.processes import Processes, ToldError, at_end, launched_processes, restore
from . import console
from .evaluate import evaluate
from .extract import extract
from .init import init
from .lasting_imports import lasting_imports
from .options import plan_of, publication_of
from .studies import advise, analyse, compare, show_advice

# How long an end by a signal may take.
_GRACE_S = 8.0


@contextmanager
def _for_people() -> Iterator[None]:
    """Let nothing reach a terminal that it cannot show, or that is more than text."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that has no ‖ must not end a merge
    out, err = (cast("TextIO", console.Printable(s)) for s in (sys.stdout, sys.stderr))
    with redirect_stdout(out), redirect_stderr(err):
        yield


@_for_people()
def run_command(args: argparse.Namespace) -> int:
    """Run a command and return its exit code; what is wrong is said in one message."""
    command: str = args.command
    # One that follows a Job, which does not end with it.
    follows = command == "submit" or getattr(args, "job", False)
    try:
        if getattr(args, "part", None) and command not in ("plan", "merge", "average"):
            raise RecipeError("only 'merge' runs in parts. Leave --part away.", field="part")
        if launched()[1] > 1 and command not in ("merge", "average"):
            raise RecipeError("only 'merge' runs in several processes. Start this one alone.")
        with (
            _ended_in_words("the Job goes on" if follows else "finished shards are kept"),
            system_errors(),
        ):
            return _COMMANDS[command](args)
    except ToldError as exc:
        return exc.code
    except _EndedError as exc:
        return exc.code
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
        if command in ("merge", "average", "demo"):
            print("nobody reads the output; the same command continues.", file=sys.stderr)
            return StoppedError.exit_code
        return 0


class _EndedError(BaseException):
    """A signal came that ends: what Jobs, containers, schedulers and closed terminals send.

    Args:
        signum: of the signal.

    Attributes:
        code: the exit code, what a shell reports of a command that the signal ended.
    """

    def __init__(self, signum: int) -> None:
        self.code = 128 + signum


@contextmanager
def _ended_in_words(goes_on: str) -> Iterator[None]:
    """End by a signal as by Ctrl-C: in order, in seconds; several see to it themselves."""
    if launched()[1] > 1 or threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(signum: int, frame: FrameType | None) -> None:
        at_end(signal.SIG_IGN)
        ended, name = _EndedError(signum), signal.Signals(signum).name
        text = f"ended by {name}; {goes_on}, the same command continues.\n"
        # A raw write: the signal may have come in the middle of another one. There may be no
        # terminal any more.
        with suppress(OSError):
            os.write(2, text.encode())
        # Whatever holds the end up, such as a large matrix in work, it is not waited for.
        timer = threading.Timer(_GRACE_S, os._exit, (ended.code,))
        timer.daemon = True
        timer.start()
        raise ended

    before = at_end(end)
    try:
        yield
    finally:
        restore(before)


def _plan(args: argparse.Namespace) -> int:
    plan = plan_of(args)
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
    if args.part and args.discard_staging:
        raise RecipeError(
            "--discard-staging would remove what other parts made. Give it alone, before the parts."
        )
    if args.part and args.out and args.push_to:
        raise RecipeError(
            "parts of a merge write into a folder that all see, or to a repository: give --out or "
            "--push-to."
        )
    with launched_processes() as processes:
        if args.discard_staging:
            with processes.main_first("discard"):
                if processes.is_main:
                    console.discarded(
                        discard_unfinished(args.out, publication_of(args), args.work_dir)
                    )
        return _run(plan_of(args), args.out, args.work_dir, as_json=args.json, processes=processes)


def _average(args: argparse.Namespace) -> int:
    given = {"last": args.last, "window": args.window}
    if args.weights is not None:
        given["weights"], _, given["decay"] = args.weights.partition(":")
    args.set = [f"{key}={value}" for key, value in given.items() if value]
    return _merge(args)


def _run(
    plan: Plan | RefusedPlan,
    out: str | None,
    work_dir: str | None,
    *,
    as_json: bool,
    processes: Processes | None = None,
) -> int:
    plan = plan.accepted()
    with lasting_imports():
        from ..run.engine import run_merge

    events = run_merge(plan, out=out, work_dir=work_dir, processes=processes)
    is_silent = processes is not None and not processes.is_main
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
    from ..run.verify import verify_merge

    recipe = load_recipe(args.recipe) if args.recipe else None
    if args.base or args.expert:
        recipe = relocated(recipe or recipe_at(args.merged), args.base, args.expert)
    if args.sample < 0:
        raise RecipeError(f"--sample must be 0 or more tensors, not {args.sample}.")
    checks = verify_merge(args.merged, recipe=recipe, sample=args.sample)
    ended = console.show_checks(checks, as_json=args.json)
    return 2 if "failed" in ended else 3 if "skipped" in ended else 0


def _submit(args: argparse.Namespace) -> int:
    # Packing this tool as a wheel is nothing that other commands wait for.
    from .submit import submit

    return submit(args)


def _methods(args: argparse.Namespace) -> int:
    from ..methods import describe_methods, method_class

    only = method_class(args.name.partition(":")[0]).name if args.name else None
    methods = [one for one in describe_methods() if only in (None, one["name"])]
    if args.json:
        print(json.dumps(methods))
    else:
        console.show_methods(methods)
    return 0


def _demo(args: argparse.Namespace) -> int:
    from ..evaluation.card import into_card
    from ..evaluation.run import Examination, evaluate_models
    from ..experts.group import built_in_recipe, builtin_group, merged_otherwise
    from ..experts.tasks import TASKS
    from ..run.verify import verify_folder

    if args.prompts < 0:
        raise RecipeError(f"--prompts must be 0 or more prompts a task, not {args.prompts}.")
    recipe = built_in_recipe(lora=args.lora)
    plan = plan_merge(recipe, out=args.out)
    _run(plan, args.out, None, as_json=args.json)
    ended = console.show_checks(verify_folder(args.out, recipe=recipe), as_json=args.json)
    if args.prompts:
        with tempfile.TemporaryDirectory() as folder:
            console.say("merging them by other methods as well, to compare")
            merges = {recipe.method: args.out, **merged_otherwise(Path(folder), recipe)}
            console.say(f"asking every model {args.prompts} held-out prompts a task")
            how = {"out": Path(folder, "asked"), "limit": args.prompts, "device": "cpu"}
            examination = Examination(TASKS, **how, say=console.say)
            document = evaluate_models({**builtin_group(), **merges}, examination)
        into_card(args.out, recipe.method, document)
        console.show_accuracies(document["models"], as_json=args.json)
        console.say(
            f"{args.out}/README.md has these scores; the demo's next step is your own: "
            "resmerge-stream plan --base ID --expert ID --expert ID"
        )
    return 2 if "failed" in ended else 0


_COMMANDS: Mapping[str, Callable[[argparse.Namespace], int]] = {
    "plan": _plan,
    "merge": _merge,
    "average": _average,
    "verify": _verify,
    "compare": compare,
    "analyse": lambda args: analyse(args, _run),
    "extract": lambda args: extract(args, _run),
    "evaluate": evaluate,
    "submit": _submit,
    "init": init,
    "methods": _methods,
    "demo": _demo,
}
