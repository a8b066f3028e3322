"""Command line: `python -m benchmarks.quality fresh`: every method in every regime, resumable.

Of the groups named (those that nothing was tuned on, unless told otherwise): trains what is
missing, merges each case by each method, asks the results, and writes `regimes.json`, from which
the table of docs/quality.md is made. A case that was asked is not asked again.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import resmerge_stream
from benchmarks.experts.groups import FRESH, GROUPS

from .asking import Asker
from .groups import ensure_groups, training_log
from .regime_page import write_section
from .regimes import answers_of, cases, evidence_of, seen_in

_LOGS = Path(__file__).parent.parent / "experts" / "logs"
_EVIDENCE = Path(resmerge_stream.__file__).parent / "studies" / "evidence.json"


def main(argv: Sequence[str]) -> None:
    """Train, merge and ask, and write the results after every case."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quality fresh", description=(__doc__ or "").split("\n\n")[1]
    )
    parser.add_argument("--work", type=Path, default=Path("build/quality"), help="models, answers")
    parser.add_argument("--prompts", type=int, default=1000, help="held-out prompts a task")
    parser.add_argument("--seed", type=int, default=2027, help="of the prompts")
    parser.add_argument(
        "--group",
        action="append",
        choices=GROUPS,
        help=f"only this group; repeat (default: {', '.join(FRESH)}; 'small' needs no training)",
    )
    parser.add_argument("--publish", action="store_true", help="update the page and the advice")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    work: Path = arguments.work
    asker = Asker(work / "answers", n_prompts=arguments.prompts, seed=arguments.seed)
    store = work / "regimes.json"
    results: dict[str, Any] = json.loads(store.read_text("utf-8")) if store.is_file() else {}
    results |= {"seed": arguments.seed, "prompts": arguments.prompts}
    names = arguments.group or FRESH
    folders = ensure_groups(work / "experts", names, ("base", "rl"))
    if FRESH[0] in names:
        ensure_groups(work / "experts", FRESH[:1], ("base", "rl", "extra"))
    for group, folder in folders.items():
        found = results.setdefault("groups", {}).setdefault(group, {})
        for case in cases(folder, work / "made" / group):
            start = time.monotonic()
            answers = answers_of(case, folder / "base", work / "regimes" / group, asker)
            answers["base"] = asker.ask(folder / "base", case.tasks)
            cosine, kind = seen_in(case, folder / "base")
            found[case.name] = {
                "regime": case.regime,
                "cosine": cosine,
                "experts": len(case.experts),
                "kind": kind,
                "answers": answers,
            }
            store.write_text(json.dumps(results), encoding="utf-8")
            seconds = time.monotonic() - start
            print(f"{group}/{case.name}: {seconds:.0f} s", file=sys.stderr, flush=True)
    if arguments.publish:
        evidence = with_others(evidence_of(results), json.loads(_EVIDENCE.read_text("utf-8")))
        _EVIDENCE.write_text(json.dumps(evidence, indent=1) + "\n", encoding="utf-8")
        write_section(Path("docs/quality.md"), evidence)
        for group in results["groups"]:
            log = training_log(work / "experts" / group)
            text = json.dumps(log, indent=1) + "\n"
            (_LOGS / f"{group}.json").write_text(text, encoding="utf-8")


def with_others(found: dict[str, Any], published: dict[str, Any]) -> dict[str, Any]:
    """Return evidence together with what is published of groups that it says nothing about.

    Raises:
        ValueError: other questions were asked of those groups.
    """
    measured = {case["group"] for case in found["cases"]}
    others = [case for case in published["cases"] if case["group"] not in measured]
    for key in ("prompts", "seed"):
        if others and found[key] != published[key]:
            raise ValueError(
                f"{key} is {found[key]} here and {published[key]} for the groups published before: "
                "measure all of them, or take that."
            )
    return found | {"cases": others + found["cases"]}
