"""Command line: `python -m benchmarks.experts --out DIR --group small|wide [--only KIND|NAME]`."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers.utils import logging as transformers_logging

from .groups import GROUPS
from .training import model_names, train_group


def main() -> None:
    """Train what is missing of a group."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.experts",
        description="Train a base model and its RL and SFT experts; finished models are kept.",
    )
    parser.add_argument("--out", type=Path, required=True, help="folder that gets DIR/GROUP/MODEL")
    parser.add_argument("--group", choices=GROUPS, default="small", help="which group")
    parser.add_argument(
        "--only",
        action="append",
        metavar="KIND",
        help="train only these models: base, rl, sft, or one expert such as rl-add; repeat",
    )
    parser.add_argument(
        "--threads",
        type=int,
        default=1,
        help="CPU threads; the same weights come out only with the same number",
    )
    parser.add_argument(
        "--checkpoints",
        action="store_true",
        help="also keep RL experts of a real language model after each ten steps: NAME@step_10",
    )
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    transformers_logging.disable_progress_bar()
    group = GROUPS[arguments.group]
    chosen = set(arguments.only or group.kinds[:3])
    tasks = group.family.tasks
    kind_of = {name: kind for kind in group.kinds for name in model_names((kind,), tasks)}
    if unknown := chosen - {*group.kinds, *kind_of}:
        known = ", ".join((*group.kinds, *kind_of))
        parser.error(f"--only takes {known}, not {', '.join(unknown)}")
    names = [name for name in kind_of if {name, kind_of[name]} & chosen]
    train_group(
        group, arguments.out / arguments.group, names=names, checkpoints=arguments.checkpoints
    )


if __name__ == "__main__":
    main()
