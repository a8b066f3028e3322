"""Regimes that a group of experts can be in, made of real updates, and every method in each.

The experts of a group have a task each and updates that are orthogonal. Overlapping, harmful,
short, long and sparse experts are made from the same updates by adding, subtracting, scaling and
cutting them, so each regime has experts that training made and one thing that is different.
"""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from benchmarks.experts.groups import EXTRA
from resmerge_stream.experts.accuracy import paired_difference
from resmerge_stream.experts.tasks import TASKS
from resmerge_stream.planning.plan import plan_merge
from resmerge_stream.studies.advice import read_regime

from .asking import Answers, Asker
from .merges import merge_by, recipe_of, trimmed

METHODS = (
    "mean",
    "task_arithmetic",
    "task_arithmetic:scale=0.7",
    "ties",
    "ram",
    "tsv_m",
    "swudi",
    "sar",
    "sar:variant=release",
    "resmerge",
    "head_regression",
)
# Parts of other experts' updates, by expert: what each regime makes of the updates D.
_MIXTURES: dict[str, dict[str, dict[str, float]]] = {
    "overlapping": {
        task: {task: 1.0, TASKS[i - 1]: 0.5} for i, task in enumerate(TASKS)
    },
    "one harmful": {"close": {"close": 1.0, "reverse": -1.0}},
    "one short": {"add": {"add": 0.1}},
    "one long": {"add": {"add": 10.0}},
}  # fmt: skip
_SPARSE = 0.03


@dataclass(frozen=True, slots=True)
class Case:
    """Experts to merge and the tasks that the result is asked.

    Attributes:
        regime: what kind of experts they are.
        name: of the case, a folder's name.
        experts: their folders.
        tasks: what they were trained on.
    """

    regime: str
    name: str
    experts: tuple[Path, ...]
    tasks: tuple[str, ...]


def cases(group: Path, made: Path) -> list[Case]:
    """Return the cases of a group, after writing the experts that are made of others.

    Args:
        group: folder with base and RL experts.
        made: gets the experts that are made.
    """
    own = {task: group / f"rl-{task}" for task in TASKS}
    found = [Case("four tasks", "four", tuple(own.values()), TASKS)]
    for regime, recipes in _MIXTURES.items():
        name = regime.replace(" ", "-")
        mixed = {
            task: _mixture(group, parts, made / f"{name}-{task}") for task, parts in recipes.items()
        }
        found.append(Case(regime, name, tuple((own | mixed).values()), TASKS))
    sparse = tuple(
        trimmed(group / "base", own[task], _SPARSE, made / f"sparse-{task}") for task in TASKS
    )
    found.append(Case("sparse", "sparse", sparse, TASKS))
    for pair in itertools.combinations(TASKS, 2):
        experts = tuple(own[task] for task in pair)
        found.append(Case("two tasks", "+".join(pair), experts, pair))
    again, harmful = (group / name for name in EXTRA)
    if again.is_dir():
        found.append(Case("one task twice", "same-task", (own["add"], again), ("add",)))
    if harmful.is_dir():
        experts = tuple((own | {"close": harmful}).values())
        found.append(Case("one trained to harm", "trained-to-harm", experts, TASKS))
    return found


def answers_of(
    case: Case, base: Path, out: Path, asker: Asker, methods: Sequence[str] = METHODS
) -> dict[str, Answers]:
    """Return the answers of every method's merge of a case; what was merged before is kept.

    Args:
        case: its experts.
        base: the base's folder.
        out: a folder for the merges.
        asker: asks them.
        methods: as `compare` names them.
    """
    store = out / case.name / "answers.json"
    found: dict[str, Answers] = json.loads(store.read_text("utf-8")) if store.is_file() else {}
    missing = [method for method in methods if method not in found]
    if missing:
        folder = out / case.name / "merged"
        shutil.rmtree(folder, ignore_errors=True)  # of a run that was cut off, perhaps an older one
        merged = merge_by(recipe_of(base, case.experts), missing, folder)
        found |= {method: asker.ask(merge.folder, case.tasks) for method, merge in merged.items()}
        store.write_text(json.dumps(found), encoding="utf-8")
        shutil.rmtree(folder)
    return found


def _mixture(group: Path, parts: Mapping[str, float], out: Path) -> Path:
    """Write base + Σ share · update in float32, and return the folder."""
    if out.is_dir():
        return out
    base = load_file(group / "base" / "model.safetensors")
    mixed = {name: tensor.float() for name, tensor in base.items()}
    for task, share in parts.items():
        expert = load_file(group / f"rl-{task}" / "model.safetensors")
        for name, tensor in mixed.items():
            tensor.add_(expert[name].float() - base[name].float(), alpha=share)
    staged = out.with_name(f"{out.name}.partial")
    shutil.rmtree(staged, ignore_errors=True)
    shutil.copytree(group / "base", staged)
    save_file(mixed, staged / "model.safetensors", metadata={"format": "pt"})
    _set_dtype(staged / "config.json")
    staged.rename(out)
    return out


def _set_dtype(path: Path) -> None:
    config: dict[str, Any] = json.loads(path.read_text("utf-8"))
    key = "dtype" if "dtype" in config else "torch_dtype"
    path.write_text(json.dumps(config | {key: "float32"}, indent=2) + "\n", encoding="utf-8")


def seen_in(case: Case, base: Path) -> tuple[float, str]:
    """Return the mean cosine of a case's updates, and the kind of group that its weights show."""
    plan = plan_merge(recipe_of(base, case.experts))
    *_, (_, _, regime) = read_regime(plan)
    plan.close()
    if regime is None:
        raise RuntimeError("the last of what is read must be the regime")
    return sum(regime.cosines) / len(regime.cosines), regime.kind


def evidence_of(results: Mapping[str, Any]) -> dict[str, Any]:
    """Return what `resmerge_stream.studies.advice` goes by: every case, each method's distance.

    Args:
        results: as `fresh` keeps them.

    Returns:
        ``cases``, each with ``points``: by method the difference to the best method of the case
        and half of its 95 % interval, in points.
    """
    found = []
    for group, measured in results["groups"].items():
        for name, case in measured.items():
            means = {method: _mean(case, method) for method in METHODS}
            best = max(means, key=lambda method: means[method])
            found.append(
                {
                    "group": group,
                    "case": name,
                    "regime": case["regime"],
                    "kind": case["kind"],
                    "experts": case["experts"],
                    "cosine": round(case["cosine"], 3),
                    "best": best,
                    "base": round(100 * _mean(case, "base"), 2),
                    "accuracy": {m: round(100 * mean, 2) for m, mean in means.items()},
                    "points": {m: gap(case, m, best) for m in METHODS},
                }
            )
    return {"prompts": results["prompts"], "seed": results["seed"], "cases": found}


def gap(case: Mapping[str, Any], method: str, other: str) -> tuple[float, float]:
    """Return by how many points a method is above another one, and half of the interval."""
    first, second = (
        [[bit == "1" for bit in bits] for bits in case["answers"][name].values()]
        for name in (method, other)
    )
    difference, half = paired_difference(first, second)
    return round(100 * difference, 2), round(100 * half, 2)


def _mean(case: Mapping[str, Any], method: str) -> float:
    shares = [bits.count("1") / len(bits) for bits in case["answers"][method].values()]
    return sum(shares) / len(shares)
