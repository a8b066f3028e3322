"""Regimes that a group of experts can be in, made of real updates, and every method in each.

The experts of a group have a task each and updates that are orthogonal. Overlapping, harmful,
short, long and sparse experts are made from the same updates by adding, subtracting, scaling and
cutting them, so each regime has experts that training made and one thing that is different.
"""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from benchmarks.experts.groups import EXTRA, GROUPS
from resmerge_stream.experts.accuracy import paired_difference
from resmerge_stream.experts.tasks import TASKS
from resmerge_stream.planning.plan import plan_merge
from resmerge_stream.studies.advice import read_regime

from .asking import Asker
from .merges import component, merge_by, recipe_of, trimmed

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
# Beside them for all RL experts of a real language model: every other method that takes several
# experts and a base. Left out are those that take two models, or no base (`slerp`, `nuslerp`,
# `nearswap`, `arcee_fusion`, `passthrough`, `linear`, `average`), those that change another
# method's result (`lines`) and second forms of one that is here (`ramplus_tl`, `della_linear`,
# `breadcrumbs_ties`).
MORE_METHODS = (
    "task_arithmetic:scale=0.3",  # the sum at the length that ResMerge's update has there
    "karcher:around=base",
    "multislerp",
    "model_stock",
    "sce",
    "consensus",
    "breadcrumbs:density=0.9",
    "dare_linear:density=0.5",
    "dare_ties:density=0.5",
    "della:density=0.5",
    "ram_plus",
    "widen",
    "dc_merge",
    "iso_c",
    "iso_cts",
    "star",
    "svc",
    "opcm",
)
_SPARSE = 0.03


@dataclass(frozen=True, slots=True)
class Case:
    """Experts to merge and the tasks that the result is asked.

    Attributes:
        regime: what kind of experts they are.
        name: of the case, a folder's name.
        experts: their folders.
        tasks: what they were trained on.
        methods: that merge them.
    """

    regime: str
    name: str
    experts: tuple[Path, ...]
    tasks: tuple[str, ...]
    methods: tuple[str, ...] = METHODS


def _mixtures(tasks: Sequence[str]) -> dict[str, dict[str, dict[str, float]]]:
    """Return the parts of other experts' updates, by expert: what a regime makes of the updates."""
    first, *_, last_but_one, last = tasks
    return {
        "overlapping": {task: {task: 1.0, tasks[i - 1]: 0.5} for i, task in enumerate(tasks)},
        "one harmful": {last: {last: 1.0, last_but_one: -1.0}},
        "one short": {first: {first: 0.1}},
        "one long": {first: {first: 10.0}},
    }


def _mixed(group: Path, own: Mapping[str, Path], made: Path) -> Iterator[Case]:
    """Yield the cases of experts that are made of others, after writing them."""
    tasks = tuple(own)
    for regime, recipes in _mixtures(tasks).items():
        name = regime.replace(" ", "-")
        mixed = {
            task: _mixture(group, parts, made / f"{name}-{task}") for task, parts in recipes.items()
        }
        yield Case(regime, name, tuple({**own, **mixed}.values()), tasks)


def cases(group: Path, made: Path) -> list[Case]:
    """Return the cases of a group, after writing the experts that are made of others.

    Args:
        group: folder with base and RL experts.
        made: gets the experts that are made.
    """
    own = {task: group / f"rl-{task}" for task in TASKS}
    found = [Case("four tasks", "four", tuple(own.values()), TASKS)]
    found += _mixed(group, own, made)
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


def cases_in_words(group: Path, tasks: Sequence[str]) -> list[Case]:
    """Return the cases of a real language model's group: of the experts that are trained so far.

    Args:
        group: folder with base, RL and SFT experts.
        tasks: of the group.
    """
    rl, sft = (_of_kind(kind, group, tasks) for kind in ("rl", "sft"))
    # Each second task's expert is the other kind.
    mixed = {t: (rl if i % 2 == 0 else sft)[t] for i, t in enumerate(t for t in rl if t in sft)}
    listed = [
        Case(f"{len(experts)} {kind}", name, tuple(experts.values()), tuple(experts), methods)
        for kind, name, experts, methods in (
            ("RL experts", "rl", rl, (*METHODS, *MORE_METHODS)),
            ("SFT experts", "sft", sft, METHODS),
            ("experts, RL and SFT by turns", "mixed", mixed, METHODS),
        )
        if len(experts) > 1
    ]
    for count in (2, 4):
        if count < len(rl):
            first = tuple(rl)[:count]
            experts = tuple(rl[task] for task in first)
            listed.append(Case(f"{count} RL experts", f"rl-{count}", experts, first))
    return listed


def made_in_words(group: Path, tasks: Sequence[str], made: Path) -> list[Case]:
    """Return the cases of a real language model's experts that are made of what was trained.

    Args:
        group: folder with base, RL experts and adapters.
        tasks: of the group.
        made: gets the experts: adapters added to their base, and mixtures of updates.
    """
    lora = _of_kind("lora", group, tasks)
    full = tuple(_full(group / "base", adapter, made) for adapter in lora.values())
    listed = [Case(f"{len(full)} LoRA experts, by RL", "lora", full, tuple(lora))]
    rl = _of_kind("rl", group, tasks)
    return [*listed[: len(full) > 1], *(_mixed(group, rl, made) if len(rl) > 2 else ())]


def _of_kind(kind: str, group: Path, tasks: Sequence[str]) -> dict[str, Path]:
    """Return the experts of a kind that are trained so far, by task."""
    named = experts_in_words(group, tasks)
    return {task: folder for folder, task in named if folder.name.startswith(f"{kind}-")}


def experts_in_words(group: Path, tasks: Sequence[str]) -> list[tuple[Path, str]]:
    """Return a real language model's experts that are trained so far, and their tasks."""
    named = [(group / f"{kind}-{t}", t) for kind in ("rl", "sft", "lora") for t in tasks]
    return [(folder, task) for folder, task in named if folder.is_dir()]


def _full(base: Path, adapter: Path, made: Path) -> Path:
    """Write an adapter's base with the adapter added, in float32, and return the folder."""
    out = made / adapter.name
    if not out.is_dir():
        staged = made / f"{adapter.name}.partial"
        merged = merge_by(recipe_of(base, [adapter]), ["task_arithmetic"], staged, output="float32")
        merged["task_arithmetic"].folder.rename(out)
        shutil.rmtree(staged)
    return out


def parts_of(base: Path, expert: Path, task: str, out: Path, asker: Asker) -> dict[str, str]:
    """Return the answers to one task of base, expert, and the expert's head and residual alone."""
    answers = {"base": asker.ask(base, (task,))[task], "expert": asker.ask(expert, (task,))[task]}
    for part in ("head", "residual"):
        folder = component(base, expert, part, out / f"{expert.name}-{part}", output="float32")
        answers[part] = asker.ask(folder, (task,))[task]
        shutil.rmtree(folder)
    return answers


def asked_of(case: Case, base: Path, out: Path, asker: Asker) -> dict[str, dict[str, Any]]:
    """Merge a case by every method of it and ask the merges; what was asked before is kept.

    Args:
        case: its experts.
        base: the base's folder.
        out: a folder for the merges.
        asker: asks them.

    Returns:
        ``answers`` and, of a real language model, ``text``: each by method.
    """
    store = out / case.name / "asked.json"
    found: dict[str, dict[str, Any]] = {"answers": {}, "text": {}}
    if store.is_file():
        found = json.loads(store.read_text("utf-8"))
    missing = [method for method in case.methods if method not in found["answers"]]
    if missing:
        folder = out / case.name / "merged"
        shutil.rmtree(folder, ignore_errors=True)  # of a run that was cut off, perhaps an older one
        merged = merge_by(recipe_of(base, case.experts), missing, folder)
        for method, merge in merged.items():
            if asker.has_text:
                found["text"][method] = asker.read(merge.folder)
            found["answers"][method] = asker.ask(merge.folder, case.tasks)
            store.write_text(json.dumps(found), encoding="utf-8")
            shutil.rmtree(merge.folder)
        shutil.rmtree(folder)
    return {
        key: {method: by_method[method] for method in case.methods if method in by_method}
        for key, by_method in found.items()
    }


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
        and half of its 95 % interval, in points; ``prompts`` a task and their ``seed``; of a real
        model ``tasks``, shares by method and task, and ``text``, by method what a merge makes of
        plain text. And ``parts`` of a real model's experts: right answers of base, expert, head and
        residual alone, on the expert's own task.
    """
    found = []
    for group, measured in results["groups"].items():
        for name, case in measured.items():
            methods = [name for name in case["answers"] if name not in ("base", "experts")]
            means = {method: _mean(case, method) for method in methods}
            best = max(means, key=lambda method: means[method])
            entry = {
                "group": group,
                "case": name,
                "regime": case["regime"],
                "model": "SmolLM2-135M" if GROUPS[group].words else None,
                "prompts": results["prompts"],
                "seed": results["seed"],
                "kind": case["kind"],
                "experts": case["experts"],
                "cosine": round(case["cosine"], 3),
                "best": best,
                "base": round(100 * _mean(case, "base"), 2),
                "accuracy": {m: round(100 * mean, 2) for m, mean in means.items()},
                "points": {m: gap(case, m, best) for m in methods},
            }
            if entry["model"]:
                entry["tasks"] = {
                    name: {task: _share(bits) for task, bits in answers.items()}
                    for name, answers in case["answers"].items()
                }
                entry["text"] = case["text"]
            found.append(entry)
    parts = [
        {
            "group": group,
            "expert": expert,
            "prompts": results["prompts"],
            "right": {part: _share(bits) for part, bits in answers.items()},
            "points": {
                part: gap({"answers": {p: {"": bits} for p, bits in answers.items()}}, part, "base")
                for part in answers
                if part != "base"
            },
        }
        for group, experts in results.get("parts", {}).items()
        for expert, answers in experts.items()
    ]
    return {"cases": found, "parts": parts}


def _share(bits: str) -> float:
    return round(100 * bits.count("1") / len(bits), 1)


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
