"""The command ``extract``: a model as a LoRA adapter of its base."""

import argparse
from collections.abc import Mapping
from typing import Any

from ..errors import RecipeError, Remedy, listed
from ..recipe import ModelRef, override
from ..run.events import Finished
from . import console
from .lasting_imports import lasting_imports
from .options import options_of, publication_of
from .studies import RunPlan

_BAR = 40  # characters


def extract(args: argparse.Namespace, run_plan: RunPlan) -> int:
    """Run ``extract`` and return its exit code.

    Args:
        args: the options.
        run_plan: merges.

    Raises:
        ResMergeError: it was refused, or stopped.
    """
    if not (args.out or args.push_to or args.dry_run):
        raise RecipeError("nowhere to write.", Remedy.GIVE_TARGET)
    if ModelRef.parse(args.model).place == ModelRef.parse(args.base).place:
        raise RecipeError(f"{args.model!r} is the base itself: there is nothing to extract.")
    with lasting_imports():
        from ..studies.extract import kept_by_rank, plan_extract

    plan = plan_extract(
        override(None, base=args.base, experts=[args.model], dtype=args.dtype),
        options_of(args),
        out=args.out,
        publication=publication_of(args),
        work_dir=args.work_dir,
        update=args.update,
    )
    if not args.dry_run:
        return run_plan(plan, args.out, args.work_dir, as_json=args.json)
    events = kept_by_rank(plan)
    try:
        if args.json:
            console.print_json(events)
        else:
            last = console.count(events)
            for line in _curve(last.report) if isinstance(last, Finished) else ():
                print(line)
    finally:
        events.close()  # type: ignore[attr-defined]  # a generator; closing it ends its threads
        plan.close()
    return 0


def _curve(report: Mapping[str, Any]) -> list[str]:
    """Return how much each rank holds, as lines of text."""
    adapter, outside = report["adapter"], report["outside"]
    if outside is None:
        return ["the model does not differ from the base: there is nothing to extract"]
    modules = adapter["modules"]
    lines = [f"share of the squared length of the difference, in {modules} matrices, by rank:"]
    for rank, share in adapter["by_rank"].items():
        lines.append(f"{rank:>6}  {100 * share:6.2f} %  {'█' * round(_BAR * share)}")
    if outside["tensors"]:
        lines.append(
            f"{100 * outside['share']:.2f} % of all that differs lies in "
            f"{len(outside['tensors'])} tensor(s) that the adapter does not hold: "
            f"{listed(outside['tensors'])}"
        )
    return lines
