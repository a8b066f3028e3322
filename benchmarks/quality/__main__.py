"""Command line: `python -m benchmarks.quality` (or `make quality`) writes docs/quality-small.md.

`python -m benchmarks.quality fresh` measures the methods in other regimes, `… rivals` the closed
forms that head regression is one of, `… distil` what training adds to a merge, `… averages` those
of checkpoints of one run, `… keep` one expert with another added, `… adapters` two papers on
merging LoRA adapters; see these modules.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.experts.groups import KNOWN

from . import adapters, averages, distil, fresh, keep, rivals
from .asking import Asker
from .groups import ensure_groups, retrain, training_log
from .merges import share_of_equal_weights
from .page import write_page
from .studies import Study, run

# The group of which every question is asked, and the expert that is trained again.
FULL = "small"
AGAIN = "rl-add"


def main() -> None:
    """Train what is missing, merge, ask, and write the page."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quality",
        description="Measure what merging does to small experts; write docs/quality-small.md.",
    )
    parser.add_argument("--work", type=Path, default=Path("build/quality"), help="models, answers")
    parser.add_argument(
        "--out", type=Path, default=Path("docs"), help="gets quality-small.md, images/"
    )
    parser.add_argument(
        "--prompts",
        type=int,
        default=2000,
        help="held-out prompts a task, half of it for the wide group",
    )
    parser.add_argument("--seed", type=int, default=2026, help="of the prompts")
    parser.add_argument("--group", action="append", choices=KNOWN, help="only this group; repeat")
    parser.add_argument("--page-only", action="store_true", help="write the page anew, no more")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    store = arguments.work / "results.json"
    if not arguments.page_only:
        _measure(arguments, arguments.group or KNOWN, store)
    write_page(json.loads(store.read_text("utf-8")), arguments.out)


def _measure(arguments: argparse.Namespace, names: Sequence[str], store: Path) -> None:
    folders = ensure_groups(arguments.work / "experts", names)
    results: dict[str, Any] = {"groups": {}}
    if store.is_file():
        results = json.loads(store.read_text("utf-8"))
    results["seed"] = arguments.seed
    for name, folder in folders.items():
        # The wide models take four times as long to ask.
        prompts = arguments.prompts if name == FULL else arguments.prompts // 2
        asker = Asker(arguments.work / "answers", n_prompts=prompts, seed=arguments.seed)
        study = Study(folder, arguments.work / "merges" / name, asker, say=_say)
        if name == FULL:
            again = retrain(arguments.work / "again", folder, AGAIN)
            study.ask(f"again:{AGAIN}", again)
            results["again"] = {
                "expert": AGAIN,
                "equal_weights": share_of_equal_weights(folder / AGAIN, again),
            }
        rows = run(study, full=name == FULL)
        results["groups"][name] = {
            "answers": study.answers,
            "facts": study.facts,
            "spectrum": rows,
            "log": training_log(folder),
            "prompts": prompts,
        }
        store.write_text(json.dumps(results), encoding="utf-8")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    studies = {
        "fresh": fresh.main,
        "rivals": rivals.main,
        "distil": distil.main,
        "averages": averages.main,
        "keep": keep.main,
        "adapters": adapters.main,
    }
    if sys.argv[1:2] and sys.argv[1] in studies:
        studies[sys.argv[1]](sys.argv[2:])
    else:
        main()
