"""Merges of a group by many methods in one pass, and what their reports say of the updates."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from resmerge_stream.planning.plan import Options, plan_merge
from resmerge_stream.recipe import ModelRef, Recipe
from resmerge_stream.run.engine import run_merge
from resmerge_stream.run.events import Event, Finished
from resmerge_stream.studies.analyse import component_recipe, plan_analysis, run_analysis
from resmerge_stream.studies.compare import run_comparison
from resmerge_stream.studies.compare_plan import plan_comparison

# How a result is stored: its dtype, and how it is rounded to it.
OUTPUTS = {
    "bf16": ("bfloat16", "nearest"),
    "stochastic": ("bfloat16", "stochastic"),
    "float32": ("float32", "nearest"),
}


@dataclass(frozen=True, slots=True)
class Merged:
    """One merge: its folder, and its row of the comparison."""

    folder: Path
    facts: dict[str, Any]


def recipe_of(base: Path, experts: Sequence[Path]) -> Recipe:
    """Return a recipe of these checkpoint folders."""
    return Recipe(ModelRef(str(base)), tuple(ModelRef(str(expert)) for expert in experts))


def merge_by(
    recipe: Recipe, methods: Sequence[str], out: Path, *, output: str = "bf16"
) -> dict[str, Merged]:
    """Merge by several methods in one pass.

    Args:
        recipe: base and experts.
        methods: ``NAME`` or ``NAME:KEY=VALUE:…`` each.
        out: a folder of its own; an interrupted pass in it is continued.
        output: one of `OUTPUTS`.
    """
    dtype, rounding = OUTPUTS[output]
    recipe = Recipe(recipe.base, recipe.experts, dtype=dtype)
    comparison = plan_comparison(recipe, methods, Options(rounding=rounding), out=out)
    report = _report(run_comparison(comparison, work_dir=out / ".work"))
    comparison.close()
    return {
        method: Merged(out / label, row)
        for method, label, row in zip(methods, comparison.plans, report["methods"], strict=True)
    }


def component(base: Path, expert: Path, part: str, out: Path, *, output: str) -> Path:
    """Write W0 + H or W0 + R of one expert (paper, Figure 1), and return its folder."""
    dtype, rounding = OUTPUTS[output]
    recipe = component_recipe(recipe_of(base, [expert]), part, "1")
    recipe = Recipe(recipe.base, recipe.experts, recipe.method, recipe.parameters, dtype)
    plan = plan_merge(recipe, Options(rounding=rounding), out=out)
    for _ in run_merge(plan, out=out, work_dir=out.parent / ".work"):
        pass
    plan.close()
    return out


def spectra(base: Path, rl: Sequence[Path], sft: Sequence[Path], out: Path) -> dict[str, Any]:
    """Return the spectral analysis of RL and SFT experts; see `resmerge_stream.studies.analyse`."""
    plan = plan_analysis(recipe_of(base, rl), [ModelRef(str(path)) for path in sft])
    report = _report(run_analysis(plan, out=out, sft=len(sft)))
    plan.close()
    return report


def trimmed(base: Path, expert: Path, share: float, out: Path) -> Path:
    """Write an expert that keeps its largest changes only; the other weights are the base's.

    Args:
        base: checkpoint folder of the base.
        expert: checkpoint folder of the expert, one weight file.
        share: of all weights that may stay changed, 0 to 1.
        out: folder of the result.
    """
    if out.is_dir():
        return out
    before, after = (load_file(path / "model.safetensors") for path in (base, expert))
    sizes = torch.cat([(after[n].float() - before[n].float()).abs().flatten() for n in before])
    # In bf16 many changes are of one size; a stable sort takes the first of these.
    largest = sizes.sort(descending=True, stable=True).indices[: round(share * len(sizes))]
    chosen = torch.zeros(len(sizes), dtype=torch.bool)
    chosen[largest] = True
    parts = chosen.split([tensor.numel() for tensor in before.values()])
    kept = {
        name: torch.where(part.view_as(before[name]), after[name], before[name])
        for name, part in zip(before, parts, strict=True)
    }
    shutil.copytree(expert, out)
    save_file(kept, out / "model.safetensors", metadata={"format": "pt"})
    return out


def share_of_equal_weights(first: Path, second: Path) -> float:
    """Return the share of weights that two checkpoint folders have in common, 0 to 1."""
    ours, theirs = (load_file(path / "model.safetensors") for path in (first, second))
    equal = sum(int((ours[name] == theirs[name]).sum()) for name in ours)
    return equal / sum(tensor.numel() for tensor in ours.values())


def _report(events: Iterable[Event]) -> dict[str, Any]:
    """Run to the end, and return what the last event reports."""
    *_, last = events
    if not isinstance(last, Finished):
        raise RuntimeError(f"the last event was {last.name!r}, not 'finished'")
    return last.report
