"""Command line: `python -m benchmarks.quality fresh`: every method in every regime, resumable.

Of the groups named (those that nothing was tuned on, unless told otherwise): trains what is
missing, merges each case by each method, asks the results, and writes `regimes.json`, from which
the table of docs/quality-small.md is made. A case that was asked is not asked again.
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
from .regime_page import real_models, section, write_between
from .regimes import (
    asked_of,
    cases,
    cases_in_words,
    evidence_of,
    experts_in_words,
    made_in_words,
    parts_of,
    seen_in,
)

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
    parser.add_argument("--case", action="append", help="only this case, such as rl; repeat")
    parser.add_argument("--publish", action="store_true", help="update the page and the advice")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    work: Path = arguments.work
    store = work / "regimes.json"
    results: dict[str, Any] = json.loads(store.read_text("utf-8")) if store.is_file() else {}
    results |= {"seed": arguments.seed, "prompts": arguments.prompts}
    names = arguments.group or FRESH
    # Experts of a real language model take hours: those that are there are merged.
    words = [name for name in names if GROUPS[name].words]
    small = [name for name in names if name not in words]
    folders = ensure_groups(work / "experts", small, ("base", "rl")) if small else {}
    folders |= {name: work / "experts" / name for name in words}
    if FRESH[0] in names:
        ensure_groups(work / "experts", FRESH[:1], ("base", "rl", "extra"))
    for group, folder in folders.items():
        found = results.setdefault("groups", {}).setdefault(group, {})
        family = GROUPS[group].family
        asker = Asker(
            work / "answers",
            n_prompts=arguments.prompts,
            seed=arguments.seed,
            family=family,
            base=folder / "base" if group in words else None,
        )
        made = work / "made" / group
        listed = (
            [*cases_in_words(folder, family.tasks), *made_in_words(folder, family.tasks, made)]
            if group in words
            else cases(folder, made)
        )
        for case in listed:
            if arguments.case and case.name not in arguments.case:
                continue
            start = time.monotonic()
            asked = asked_of(case, folder / "base", work / "regimes" / group, asker)
            answers, text = asked["answers"], asked["text"]
            answers["base"] = asker.ask(folder / "base", case.tasks)
            if group in words:
                text["base"] = asker.read(folder / "base")
                # Each on its own task: what a merge would have if nothing were lost.
                answers["experts"] = {
                    task: asker.ask(expert, (task,))[task]
                    for task, expert in zip(case.tasks, case.experts, strict=True)
                }
            cosine, kind = seen_in(case, folder / "base")
            found[case.name] = {
                "regime": case.regime,
                "cosine": cosine,
                "experts": len(case.experts),
                "kind": kind,
                "answers": answers,
                "text": text,
            }
            store.write_text(json.dumps(results), encoding="utf-8")
            seconds = time.monotonic() - start
            print(f"{group}/{case.name}: {seconds:.0f} s", file=sys.stderr, flush=True)
        if group in words:
            parts = results.setdefault("parts", {}).setdefault(group, {})
            for expert, task in experts_in_words(folder, family.tasks):
                if expert.name not in parts and not expert.name.startswith("lora-"):
                    parts[expert.name] = parts_of(
                        folder / "base", expert, task, work / "parts", asker
                    )
                    store.write_text(json.dumps(results), encoding="utf-8")
    evidence = with_others(evidence_of(results), json.loads(_EVIDENCE.read_text("utf-8")))
    if words:
        print(real_models(evidence))
    if arguments.publish:
        _EVIDENCE.write_text(json.dumps(evidence, indent=1) + "\n", encoding="utf-8")
        write_between(Path("docs/quality-small.md"), "regimes", section(evidence))
        write_between(Path("docs/quality.md"), "real model", real_models(evidence))
        for group in results["groups"]:
            log = training_log(work / "experts" / group)
            text = json.dumps(log, indent=1) + "\n"
            (_LOGS / f"{group}.json").write_text(text, encoding="utf-8")


def with_others(found: dict[str, Any], published: dict[str, Any]) -> dict[str, Any]:
    """Return evidence together with what is published of groups that it says nothing about."""
    measured = {case["group"] for case in found["cases"]}
    return {
        key: [one for one in published[key] if one["group"] not in measured] + found[key]
        for key in ("cases", "parts")
    }
