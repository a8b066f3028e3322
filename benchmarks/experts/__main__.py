"""Command line: `python -m benchmarks.experts --out DIR --group small|wide [--only KIND|NAME]`."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers.utils import logging as transformers_logging

from .groups import GROUPS
from .training import model_names, train_group

KINDS = ("base", "rl", "sft", "extra")


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
        choices=(*KINDS, *model_names(KINDS[1:])),
        metavar="KIND",
        help="train only these models: base, rl, sft, or one expert such as rl-add; repeat",
    )
    parser.add_argument(
        "--threads",
        type=int,
        default=1,
        help="CPU threads; the same weights come out only with the same number",
    )
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    transformers_logging.disable_progress_bar()
    chosen = arguments.only or KINDS[:3]
    kind_of = {name: kind for kind in KINDS for name in model_names((kind,))}
    names = [name for name in model_names(KINDS) if {name, kind_of[name]} & set(chosen)]
    train_group(GROUPS[arguments.group], arguments.out / arguments.group, names=names)


if __name__ == "__main__":
    main()
