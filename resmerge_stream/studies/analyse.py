"""The paper's spectral analysis of experts, without merging (its 5.4, 5.5, A.3, A.4).

Of every matrix and expert: the head's share of energy, stable rank ‖Δ‖²/σ₁² and effective rank
exp(−Σ p ln p), p = σ/Σσ (Roy & Vetterli 2007), before and after the head is removed, and the share
of unchanged weights. Of every group of experts: residual coherence c_R beside its floor 1/√N, s_R,
head agreement S_H, retentions and pairwise cosines. The paper names the ranks without formulas;
these are the usual ones.
"""

import contextlib
import json
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..device import choose_device
from ..errors import Notice, RecipeError, Remedy
from ..maths.factors import singular_values
from ..maths.task_vectors import TaskVectors
from ..memory import svd_bytes
from ..methods.parts.gates import Knobs, decide
from ..methods.parts.heads import heads_of, project_heads, residual_gram
from ..planning.plan import Options, Plan, RefusedPlan, plan_merge
from ..recipe import ModelRef, Recipe
from ..run.events import Analysed, Event, Finished, Planned
from ..run.merging import Merger
from ..run.pieces import Piece
from ..run.reading import reads
from ..run.shards import environment
from ..specs import DTYPES
from ..units import format_size
from .advice import advise
from .analysis_report import analysis_files
from .compare_report import write_files
from .regime import Pairs, sampled

_GATES = ("c_R", "c_R_floor", "s_R", "S_H", "ret_H", "ret_R", "pair_cosines_H", "pair_cosines_R")


def plan_analysis(
    recipe: Recipe, sft: Sequence[ModelRef] = (), options: Options | None = None, *, rank: int = 1
) -> Plan | RefusedPlan:
    """Plan an analysis: as a merge that writes nothing.

    Args:
        recipe: base and (RL) experts; its method does not matter.
        sft: experts trained by supervised fine-tuning, to compare with.
        options: device and memory.
        rank: directions k in the head.
    """
    everyone = tuple(replace(ref, weight=None) for ref in (*recipe.experts, *sft))
    plan = plan_merge(
        replace(recipe, experts=everyone, method="resmerge", parameters={"rank": rank}), options
    )
    if isinstance(plan, RefusedPlan):
        return plan
    matrices = [t.matrix for t in plan.tensors.values() if t.is_decomposed]
    spectrum = max((svd_bytes(m, n, 0) for m, n in matrices), default=0)
    needed = plan.peak_memory_bytes + spectrum
    if needed > plan.memory_budget:
        return RefusedPlan.of(
            plan,
            Notice(
                f"the analysis needs {format_size(needed)} of memory, but the budget is "
                f"{format_size(plan.memory_budget)}.",
                Remedy.MORE_MEMORY,
                needed=f"{-(-needed // 1_000_000)}MB",
            ),
        )
    return replace(plan, working_bytes=plan.working_bytes + spectrum, peak_memory_bytes=needed)


def run_analysis(
    plan: Plan | RefusedPlan, *, out: str | Path, sft: int = 0, share: float = 1.0
) -> Iterator[Event]:
    """Run an analysis, and yield what happens; the last event carries ``analysis.json``.

    Args:
        plan: from `plan_analysis`.
        out: the folder for tables and figures; earlier ones are replaced.
        sft: how many of the last experts are the SFT group.
        share: of the layers that are read, evenly spaced; 1 is everything.

    Raises:
        PlanRefusedError: the plan is refused.
        NonFiniteError: a weight is NaN or infinite.
        StoppedError: the results cannot be written.

    Memory: `plan.peak_memory_bytes`.
    """
    plan = plan.accepted()
    out = Path(os.path.expanduser(out))
    merged = [tensor for tensor in plan.tensors.values() if tensor.rule]
    tensors = sampled(merged, share)
    to_read = sum(nbytes for nbytes, _ in reads(tensors))
    yield Planned(plan=plan.to_dict() | {"read_bytes": to_read})
    started = time.monotonic()
    count = len(plan.experts)
    groups = {"RL": list(range(count - sft)), "SFT": list(range(count - sft, count))}
    groups = {name: members for name, members in groups.items() if members}
    merger = Merger(plan, choose_device(plan.options.device))
    bytes_read, entries = 0, []
    pieces: list[dict[str, Any]] = []
    pairs = Pairs(count - sft)
    each = merger.each(
        tensors,
        lambda piece: _measure(merger, piece, groups),
        beside=lambda one: svd_bytes(*one.matrix, 0) if one.is_decomposed else 0,
    )
    with contextlib.closing(each) as analysed:
        for piece, found in filter(None, analysed):
            bytes_read += piece.nbytes
            pairs.absorb(found.pop("pairs"))
            pieces.append(found)
            if piece.is_last:
                entries.append(_entry(piece, pieces, count))
                pieces = []
                yield Analysed(tensor=piece.tensor.spec.name, bytes_read=bytes_read)
    weights = sum(math.prod(tensor.spec.shape) for tensor in merged)
    regime = pairs.regime(pairs.numel / max(weights, 1))
    report = {
        "version": 1,
        "regime": regime.to_dict(),
        "advice": advise(regime).to_dict(),
        "rank": plan.method.parameters()["rank"],
        "base": str(plan.recipe.base),
        "experts": [
            {"id": str(ref), "group": name}
            for name, members in groups.items()
            for ref in (plan.recipe.experts[i] for i in members)
        ],
        "environment": environment(merger),
        "seconds": round(time.monotonic() - started, 3),
        "tensors": entries,
    }
    files = analysis_files(report)
    write_files(out, files)
    yield Finished(where=str(out), report=json.loads(files["analysis.json"]))


def component_recipe(recipe: Recipe, component: str, of: str, *, rank: int = 1) -> Recipe:
    """Return the recipe of a component-recovery model (paper, Figure 1): W0 + H_i or W0 + R_i.

    Tensors without a head (vectors, embeddings, LM head) are the expert's own.

    Args:
        recipe: base and experts.
        component: ``head`` or ``residual``.
        of: an expert as the recipe names it, or its number from 1.
        rank: directions k in the head.

    Raises:
        RecipeError: no such expert or component.
    """
    names = [str(ref) for ref in recipe.experts]
    chosen = [ref for ref in recipe.experts if of in (str(ref), ref.id)]
    if not chosen and of.isdigit() and 1 <= int(of) <= len(names):
        chosen = [recipe.experts[int(of) - 1]]
    if not chosen:
        raise RecipeError(f"{of!r} is not one of the experts: {', '.join(names)}.")
    ablations = {"head": "head_only", "residual": "residual_only"}
    if component not in ablations:
        raise RecipeError(f"the component must be head or residual, not {component!r}.")
    # For one expert these two ablations are W0 + H and W0 + R exactly.
    parameters = {"rank": rank, "ablation": ablations[component], "other": "sum"}
    return replace(
        recipe,
        experts=(replace(chosen[0], weight=None),),
        method="resmerge",
        parameters=parameters,
    )


def _measure(merger: Merger, piece: Piece, groups: Mapping[str, list[int]]) -> dict[str, Any]:
    """Return what is known of one matrix, or of some rows of a tensor without SVD."""
    with merger.naming(piece.tensor):
        _, vectors = merger.open(piece)
        # Advice is on the experts to merge: the SFT group stands beside them.
        among = [i for i, e in enumerate(piece.tensor.experts) if e in groups["RL"]]
        members, pairs = [piece.tensor.experts[i] for i in among], Pairs(len(groups["RL"]))
        dtype = DTYPES[piece.tensor.spec.dtype].torch_name
        unchanged = torch.zeros(vectors.count, dtype=torch.int64)
        for block in vectors.blocks():
            stack = vectors.stack(block)
            for i, delta in enumerate(stack):
                unchanged[i] += delta.numel() - int(torch.count_nonzero(delta))
            pairs.add_block(vectors.base(block), stack[among], members, dtype)
            piece.release(block)
        D = vectors.gram()
        pairs.add_gram(D[among][:, among], members)
    found: dict[str, Any] = {
        "pairs": pairs,
        "unchanged": unchanged.tolist(),
        "numel": math.prod(vectors.shape),
        "energy": D.diagonal().tolist(),
    }
    if piece.tensor.is_decomposed and not vectors.is_zero():
        rank = piece.tensor.method.parameters()["rank"]
        found["spectra"] = [spectrum(vectors, i, rank) for i in range(vectors.count)]
        here = {expert: i for i, expert in enumerate(piece.tensor.experts)}
        local = {name: [here[i] for i in group if i in here] for name, group in groups.items()}
        found["groups"] = _geometry(vectors, D, rank, local)
    vectors.close()
    return found


def spectrum(vectors: TaskVectors, i: int, rank: int) -> dict[str, float | None]:
    """Return head energy, stable and effective rank of Δ_i, and of its residual."""
    sigma = singular_values(vectors.matrix(i))
    total = float((sigma**2).sum())
    rest = sigma[rank:]
    left = float((rest**2).sum())
    return {
        "head_energy": 1 - left / total if total > 0 else None,
        "stable_rank": total / float(sigma[0]) ** 2 if total > 0 else None,
        "stable_rank_residual": left / float(rest[0]) ** 2 if left > 0 else None,
        "effective_rank": _effective_rank(sigma) if total > 0 else None,
        "effective_rank_residual": _effective_rank(rest) if left > 0 else None,
    }


def _effective_rank(sigma: torch.Tensor) -> float:
    p = sigma[sigma > 0] / sigma.sum()
    return math.exp(-float((p * p.log()).sum()))


def _geometry(
    vectors: TaskVectors, D: torch.Tensor, rank: int, groups: Mapping[str, list[int]]
) -> dict[str, Any]:
    """Return the gates of each group of at least two experts (Eqs. 8, 14, 17)."""
    heads = heads_of(vectors, rank, D.diagonal().tolist())
    V, Y = project_heads(vectors, heads, D)
    _, Q, G = residual_gram(vectors, D, V, Y)
    knobs = Knobs("paper", 1.0, 0.2, 0.7, 1.0)
    found = {}
    for name, members in groups.items():
        if len(members) < 2:
            continue
        among = [X[members][:, members] for X in (D, Q, G)]
        report = decide(among[0], among[1], among[2], knobs).report
        found[name] = {key: report.get(key) for key in _GATES}
    return found


def _entry(piece: Piece, pieces: Sequence[Mapping[str, Any]], count: int) -> dict[str, Any]:
    """Return the row of a tensor from its pieces: rows of one tensor, or slices of a stack.

    Of `count` experts those that lack the tensor have nothing to tell of it.
    """
    spec, rule = piece.tensor.spec, piece.tensor.rule
    numel = sum(found["numel"] for found in pieces)
    experts: list[dict[str, Any]] = [{} for _ in range(count)]
    for i, expert in enumerate(piece.tensor.experts):
        unchanged = sum(found["unchanged"][i] for found in pieces)
        energy = math.fsum(found["energy"][i] for found in pieces)
        experts[expert] |= {"norm": math.sqrt(energy), "unchanged": unchanged / max(numel, 1)}
    entry: dict[str, Any] = {
        "name": spec.name,
        "role": rule.role.value if rule else None,
        "shape": list(spec.shape),
        "experts": experts,
    }
    measured = [found for found in pieces if "spectra" in found]
    if measured:
        for i, expert in enumerate(piece.tensor.experts):
            experts[expert] |= _mean_of([found["spectra"][i] for found in measured])
        names = {name for found in measured for name in found["groups"]}
        entry["groups"] = {
            name: _mean_of([found["groups"][name] for found in measured]) for name in sorted(names)
        }
    return entry


def _mean_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return one row; of the slices of a stack, the means."""
    if len(rows) == 1:
        return dict(rows[0])
    merged: dict[str, Any] = {}
    for key in rows[0]:
        values = [row[key] for row in rows if row[key] is not None]
        if values and isinstance(values[0], list):
            merged[key] = [sum(column) / len(column) for column in zip(*values, strict=True)]
        else:
            merged[key] = sum(values) / len(values) if values else None
    return merged
