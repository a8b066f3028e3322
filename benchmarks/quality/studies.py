"""Which merges are asked: one function a question, each returning answers and facts by label.

A label is `METHOD|OUTPUT`, behind `SET:` where not all RL experts of the group are merged.
"""

from __future__ import annotations

import itertools
import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from resmerge_stream.experts.tasks import TASKS
from resmerge_stream.methods import MergeMethod, build_method, find_methods

from .asking import Answers, Asker
from .groups import RL, SFT
from .merges import Merged, component, merge_by, recipe_of, spectra, trimmed

ABLATIONS = tuple(
    f"resmerge:ablation={name}" for name in ("head_only", "residual_only", "no_head", "ungated")
)
RELEASES = tuple(f"resmerge:variant=release-2026-{month}" for month in ("06", "07"))
# The methods of the paper's Table 1 and its neighbours: asked where all would take too long.
MAIN = (
    "resmerge",
    "task_arithmetic",
    "mean",
    "ties:paper",
    "tsv_m",
    "iso_c",
    "ram",
    *ABLATIONS[:2],
)
RANKS = tuple(f"resmerge:rank={k}" for k in (1, 2, 4, 8, 16))
BUDGETS = tuple(f"resmerge:rho={rho}" for rho in (0, 0.1, 0.5, 1, 10))
UNGATED = tuple(f"resmerge:ablation=ungated:rho={rho}" for rho in (0.1, 0.5, 1))
SCALES = tuple(f"task_arithmetic:lambda={scale}" for scale in (0.25, 0.4, 0.55, 0.7, 0.85, 1, 1.3))
FEW = ("mean", "task_arithmetic", "resmerge", "ram", "tsv_m")
SHARES = (0.1, 0.03, 0.01)


def all_methods() -> tuple[str, ...]:
    """Return every method for any number of experts, with ResMerge's releases and ablations."""
    methods = find_methods().values()
    several = [method for method in methods if method.models[1] is None]
    return (*(_as_in_its_paper(method) for method in several), *RELEASES, *ABLATIONS)


def _as_in_its_paper(method: type[MergeMethod]) -> str:
    """Return the name of a method's settings in its paper: a preset, where the defaults differ."""
    preset = {"preset": "paper"}
    if "paper" in method.presets and method() != build_method(method.name, preset):
        return f"{method.name}:paper"
    return method.name


@dataclass(slots=True)
class Study:
    """One group, its answers so far, and where its merges are.

    Attributes:
        group: folder with the models of the group.
        out: folder for the merges.
        asker: asks the models.
        answers: by label.
        facts: what the reports say of the merges, by label.
    """

    group: Path
    out: Path
    asker: Asker
    answers: dict[str, Answers] = field(default_factory=dict)
    facts: dict[str, dict[str, Any]] = field(default_factory=dict)
    say: Callable[[str], None] = print

    def ask(self, label: str, folder: Path, tasks: Sequence[str] = TASKS) -> None:
        """Ask one model, unless it was asked under this label."""
        self.say(f"{self.group.name}: {label}")
        self.answers[label] = self.asker.ask(folder, tasks)

    def merge(
        self,
        methods: Sequence[str],
        *,
        output: str,
        experts: Sequence[Path] | None = None,
        prefix: str = "",
        tasks: Sequence[str] = TASKS,
    ) -> dict[str, Merged]:
        """Merge experts (all RL experts when None) by some methods, and ask the results."""
        chosen = experts or [self.group / name for name in RL]
        # The same merges in another run find their folder again.
        name = f"{prefix or 'all'}-{output}-{zlib.crc32(' '.join(methods).encode()):08x}"
        recipe = recipe_of(self.group / "base", chosen)
        merged = merge_by(recipe, methods, self.out / name.replace(":", ""), output=output)
        for method, merge in merged.items():
            label = f"{prefix}{method}|{output}"
            self.ask(label, merge.folder, tasks)
            self.facts[label] = merge.facts
        return merged


def models(study: Study, names: Sequence[str]) -> None:
    """Base and experts themselves."""
    for name in names:
        study.ask(name, study.group / name)


def methods(study: Study, outputs: Mapping[str, Sequence[str]]) -> None:
    """Table 1 and 2: methods, releases and ablations, by output."""
    for output, chosen in outputs.items():
        study.merge(chosen, output=output)


def knobs(study: Study) -> None:
    """Figure 3: rank k and budget ρ, in float32, so that rounding hides nothing."""
    study.merge((*RANKS, *BUDGETS, *UNGATED), output="float32")


def scales(study: Study) -> None:
    """The sum of the task vectors at several lengths, and at the length of ResMerge's update."""
    merged = study.merge(("resmerge", *SCALES), output="float32")
    norm = {method: merge.facts["relative_norm"] for method, merge in merged.items()}
    same = norm["resmerge"] / norm["task_arithmetic:lambda=1"]
    label = f"task_arithmetic:lambda={same:.6f}"
    found = study.merge((label,), output="float32")[label]
    study.answers["same-length|float32"] = study.answers.pop(f"{label}|float32")
    study.facts["same-length|float32"] = found.facts


def components(study: Study, outputs: Sequence[str]) -> None:
    """Figure 1: an expert's head alone and its residual alone, on its own task."""
    parts = ("head", "residual")
    for name, part, output in itertools.product((*RL, *SFT), parts, outputs):
        folder = study.out / f"{name}-{part}-{output}"
        base, expert = study.group / "base", study.group / name
        folder = component(base, expert, part, folder, output=output)
        study.ask(f"{name}:{part}|{output}", folder, (name.partition("-")[2],))


def subsets(study: Study) -> None:
    """Two and three experts: every choice of them, asked the tasks of those merged."""
    for count in (2, 3):
        for tasks in itertools.combinations(TASKS, count):
            experts = [study.group / f"rl-{task}" for task in tasks]
            prefix = "+".join(tasks) + ":"
            study.merge(FEW, output="float32", experts=experts, prefix=prefix, tasks=tasks)


def sparsity(study: Study) -> None:
    """Experts that keep their largest changes only, and merges of these."""
    for share in SHARES:
        prefix = f"top-{share:g}:"
        experts = []
        for name in RL:
            source, out = study.group / name, study.out / f"{name}-top-{share:g}"
            experts.append(trimmed(study.group / "base", source, share, out))
            study.ask(f"{prefix}{name}", experts[-1], (name.partition("-")[2],))
        study.merge(FEW, output="float32", experts=experts, prefix=prefix)


def fine_tuned(study: Study) -> None:
    """The SFT experts of the same base, merged."""
    experts = [study.group / name for name in SFT]
    study.merge(MAIN, output="bf16", experts=experts, prefix="sft:")


def spectrum(study: Study) -> list[dict[str, Any]]:
    """Return per expert the means over its attention and FFN matrices, RL before SFT."""
    folders = [[study.group / name for name in names] for names in (RL, SFT)]
    report = spectra(study.group / "base", *folders, study.out / "analysis")
    rows = []
    for i, name in enumerate((*RL, *SFT)):
        row: dict[str, Any] = {"name": name, "changed": _changed(report["tensors"], i)}
        for family in ("attention", "ffn"):
            entries = [e["experts"][i] for e in report["tensors"] if e["role"] == family]
            entries = [e for e in entries if e.get("head_energy") is not None]
            for key in ("head_energy", "stable_rank", "stable_rank_residual"):
                row[f"{family} {key}"] = sum(e[key] for e in entries) / len(entries)
        rows.append(row)
    return [*rows, {"name": "gates", **_gates(report["tensors"])}]


def _changed(tensors: Sequence[Mapping[str, Any]], i: int) -> float:
    sizes = [math.prod(entry["shape"]) for entry in tensors]
    unchanged = [entry["experts"][i]["unchanged"] for entry in tensors]
    return 1 - sum(n * u for n, u in zip(sizes, unchanged, strict=True)) / sum(sizes)


def _gates(tensors: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the means of c_R, its floor and S_H over matrices, by kind of expert."""
    found: dict[str, Any] = {}
    for kind, key in itertools.product(("RL", "SFT"), ("c_R", "c_R_floor", "S_H", "s_R")):
        values = [e["groups"][kind][key] for e in tensors if kind in e.get("groups", {})]
        found[f"{kind} {key}"] = sum(values) / len(values)
    return found


def run(study: Study, *, full: bool) -> list[dict[str, Any]]:
    """Run the studies of a group, and return its spectra.

    Args:
        study: receives answers and facts.
        full: whether every question is asked; else those that compare the groups.
    """
    everything = all_methods()
    models(study, ("base", *RL, *SFT))
    rows = spectrum(study)
    methods(study, {"bf16": everything, "float32": everything if full else MAIN[:3]})
    components(study, ("float32", "bf16") if full else ("float32",))
    knobs(study)
    scales(study)
    if full:
        methods(study, {"stochastic": everything})
        fine_tuned(study)
        subsets(study)
        sparsity(study)
    return rows
