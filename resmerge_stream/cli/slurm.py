"""``submit --slurm``: plan here, and write the batch file that merges on a cluster."""

import argparse
import os
from pathlib import Path

from ..errors import RecipeError, Remedy
from ..jobs.slurm import Batch, batch_file
from . import console
from .options import plan_of

# Of what says what to merge: the attributes that are flags with one value.
_FLAGS = ("base", "method", "dtype", "tokenizer_source", "chat_template", "generation_config")


def write_batch(args: argparse.Namespace) -> int:
    """Print the file, or write it, and return the exit code.

    Raises:
        ResMergeError: the merge is refused, or the file cannot be written.
    """
    if not args.out and not args.push_to:
        raise RecipeError("nowhere to write.", Remedy.GIVE_TARGET)
    batch = Batch(nodes=args.nodes, processes=args.processes, cpus=args.cpus, array=args.array)
    if min(batch.nodes, batch.processes, batch.cpus) < 1 or batch.array < 0:
        raise RecipeError("a merge needs at least one node, one process and one core.")
    if batch.array and (batch.nodes > 1 or batch.processes > 1):
        raise RecipeError(
            "the parts of an array share no network: give --array, or --nodes and --processes."
        )
    plan = plan_of(args).accepted()
    # The words of the merge, with paths that hold in every folder.
    words = ["merge", *([_absolute(args.recipe)] if args.recipe else [])]
    for name in _FLAGS:
        if value := getattr(args, name):
            words += [f"--{name.replace('_', '-')}", _absolute(value)]
    words += [word for expert in args.expert for word in ("--expert", _absolute(expert))]
    words += [word for setting in args.set for word in ("--set", setting)]
    words += plan.request.options.words()
    words += plan.publication.words() if plan.publication is not None else []
    for name in ("out", "work_dir"):
        if value := getattr(args, name):
            path = os.path.abspath(os.path.expanduser(value))
            words += [f"--{name.replace('_', '-')}", path]
    if args.update and plan.publication is None:
        words.append("--update")
    try:
        text = batch_file(plan, batch, words)
        for warning in plan.warnings:
            console.say(f"warning: {warning}")
    finally:
        plan.close()
    if args.script is None:
        print(text, end="")
        return 0
    try:
        with Path(args.script).open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError as exc:
        raise RecipeError(f"{args.script!r} is there already; name another file.") from exc
    console.say(f"wrote {args.script}; submit it with: sbatch {args.script}")
    return 0


def _absolute(name: str) -> str:
    """Return a path in full; anything else, such as a repository's name, as it is."""
    path = os.path.expanduser(name)
    return os.path.abspath(path) if os.path.exists(path) else name
