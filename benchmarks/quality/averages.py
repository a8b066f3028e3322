"""Command line: `python -m benchmarks.quality averages`: checkpoints of one run, averaged.

The run is an RL expert of a real language model, kept after each ten steps at a constant rate
(`python -m benchmarks.experts --checkpoints`). Averages of its last checkpoints, as the learning
rate's decay would weight them, are asked its task beside the last checkpoint alone.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.experts.groups import GROUPS
from resmerge_stream.experts.accuracy import paired_difference
from resmerge_stream.planning.plan import plan_merge
from resmerge_stream.recipe import ModelRef, Recipe
from resmerge_stream.run.engine import run_merge

from .asking import asker_of, study_parser
from .tables import table

_LAST = (2, 4, 8)
_WEIGHTS = ("uniform", "1-sqrt", "ema")


def main(argv: Sequence[str]) -> None:
    """Average, ask, and print the table."""
    text = (__doc__ or "").split("\n\n")[1]
    parser = study_parser("averages", text, group="smollm2", prompts=500, seed=2031)
    parser.add_argument(
        "--expert", default="rl-call", help="the run, of which checkpoints are kept"
    )
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    group = GROUPS[arguments.group]
    folder: Path = arguments.work / "experts" / group.name
    run = sorted(
        folder.glob(f"{arguments.expert}@step_*"), key=lambda path: int(path.name.split("_")[-1])
    )
    if len(run) < max(_LAST):
        parser.error(
            f"{folder} has {len(run)} checkpoints of {arguments.expert}, and {max(_LAST)} are "
            "averaged. Train it with `python -m benchmarks.experts --checkpoints`."
        )
    asker = asker_of(arguments)
    task = arguments.expert.split("-")[1]
    answers = {"base": asker.ask(folder / "base", (task,))[task]}
    answers |= {
        f"step {path.name.split('_')[-1]}": asker.ask(path, (task,))[task]
        for path in run[-max(_LAST) :]
    }
    last = next(reversed(answers))
    out = arguments.work / "averages"
    for count in _LAST:
        for weights in _WEIGHTS:
            shutil.rmtree(out, ignore_errors=True)
            models = tuple(ModelRef(str(path)) for path in run[-count:])
            plan = plan_merge(Recipe(None, models, "average", {"weights": weights}), out=out)
            for _ in run_merge(plan, out=out, work_dir=arguments.work / ".averages"):
                pass
            plan.close()
            answers[f"last {count}, `{weights}`"] = asker.ask(out, (task,))[task]
    shutil.rmtree(out)
    rows = []
    for name, bits in answers.items():
        # Each as the answers to one task.
        ours, theirs = ([[bit == "1" for bit in found]] for found in (bits, answers[last]))
        difference, half = paired_difference(ours, theirs)
        gap = "–" if name == last else f"{100 * difference:+.1f} ± {100 * half:.1f}"
        rows.append([name, f"{100 * bits.count('1') / len(bits):.1f}", gap])
    print(
        f"{arguments.expert}, {arguments.prompts} held-out prompts of its task\n", file=sys.stderr
    )
    print(table(["model", "right, %", f"points from {last}"], rows))
