"""The commands ``compare`` and ``analyse``: several methods, or spectra, in one pass."""

import argparse
import math
import os
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

from ..errors import RecipeError
from ..planning.plan import Plan, RefusedPlan, plan_merge
from ..run.events import Event
from ..units import format_size
from . import console
from .evaluate import examination_of
from .lasting_imports import lasting_imports
from .options import options_of, recipe_of


class RunPlan(Protocol):
    """Merges, as the command ``merge`` does."""

    def __call__(
        self, plan: Plan | RefusedPlan, out: str | None, work_dir: str | None, *, as_json: bool
    ) -> int:
        """Return the exit code."""
        ...


def share_of(text: str) -> float:
    """Return a share of the layers, above 0 and up to 1.

    Raises:
        RecipeError: the text is no such share.
    """
    number = text.strip().removesuffix("%")
    try:
        share = float(number) / (100 if number != text.strip() else 1)
    except ValueError:
        share = math.nan
    if not 0 < share <= 1:
        raise RecipeError(f"the sample must be a share of the layers, such as 20%, not {text!r}.")
    return share


def advise(plan: Plan, sample: str) -> dict[str, Any]:
    """Return regime and advice of a plan's experts as plain data; reads their weights.

    Raises:
        ResMergeError: the share is none, or a weight is not finite.
    """
    share = share_of(sample)
    with lasting_imports():
        from ..studies.advice import advise as advise_on
        from ..studies.advice import read_regime

    *_, (_, nbytes, regime) = read_regime(plan, share)
    if regime is None:
        raise RuntimeError("the last of what is read must be the regime")
    advice = advise_on(regime)
    return {"regime": regime.to_dict(), "advice": advice.to_dict(), "bytes_read": nbytes}


def show_advice(found: Mapping[str, Any]) -> None:
    """Print regime and advice."""
    from ..studies.analysis_report import advice_lines

    for line in advice_lines(found["regime"], found["advice"]):
        print(line.replace("`", ""))


def compare(args: argparse.Namespace) -> int:
    """Run ``compare`` and return its exit code.

    Raises:
        ResMergeError: it was refused, or stopped.
    """
    from ..studies.compare_plan import plan_comparison

    if args.evaluate != bool(args.tasks):
        raise RecipeError("--evaluate and --tasks need each other: give both.")
    if args.keep == "best" and not args.evaluate:
        raise RecipeError(
            "--keep best needs the models' answers: give --evaluate and --tasks as well."
        )
    if args.at_least and args.keep != "best":
        raise RecipeError("--at-least says whether the best is kept: give --keep best.")
    names = [name for name in args.methods.split(",") if name.strip()]
    comparison = plan_comparison(
        recipe_of(args),
        names,
        options_of(args),
        out=args.out,
        report_only=args.report_only,
        update=args.update,
    )
    console.say(f"memory: at most {format_size(comparison.peak_memory_bytes)} private")
    if args.evaluate:
        with lasting_imports():
            from ..evaluation.contest import run_contest

        examination = examination_of(args, args.out)
        how = {"keep": args.keep, "at_least": args.at_least, "work_dir": args.work_dir}
        events = run_contest(comparison, examination, **how)
        _show(events, args, "comparison.md", "evaluation.md")
    else:
        with lasting_imports():
            from ..studies.compare import run_comparison

        _show(run_comparison(comparison, work_dir=args.work_dir), args, "comparison.md")
    comparison.close()
    return 0


def analyse(args: argparse.Namespace, run_plan: RunPlan) -> int:
    """Run ``analyse`` and return its exit code.

    Args:
        args: the options.
        run_plan: merges, for ``--component``.

    Raises:
        ResMergeError: it was refused, or stopped.
    """
    with lasting_imports():
        from ..studies.analyse import component_recipe, plan_analysis, run_analysis
    from ..recipe import ModelRef

    recipe = recipe_of(args)
    if bool(args.component) != bool(args.of):
        raise RecipeError(
            "--component (head or residual) and --of (the expert) need each other: give both."
        )
    if args.component:
        chosen = component_recipe(recipe, args.component, args.of, rank=args.rank)
        return run_plan(
            plan_merge(chosen, options_of(args), out=args.out), args.out, None, as_json=args.json
        )
    sft = [ModelRef.parse(text) for text in args.sft]
    plan = plan_analysis(recipe, sft, options_of(args), rank=args.rank)
    share = share_of(args.sample)
    _show(run_analysis(plan, out=args.out, sft=len(sft), share=share), args, "analysis.md")
    plan.close()
    return 0


def _show(events: Iterator[Event], args: argparse.Namespace, *tables: str) -> None:
    """Print events as JSON, or a count of them and then the tables that they end in."""
    from pathlib import Path

    if args.json:
        console.print_json(events)
        return
    console.count(events)
    folder = Path(os.path.expanduser(args.out))
    texts = [(folder / table).read_text(encoding="utf-8").rstrip() for table in tables]
    # Which one is best ends every table of a comparison, and is said once, last.
    last = texts[-1].rpartition("\n")[2]
    for text in texts[:-1]:
        print(text.removesuffix(last).rstrip(), end="\n\n")
    print(texts[-1])
