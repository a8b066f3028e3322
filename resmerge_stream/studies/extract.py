"""A whole model as a LoRA adapter of its base, and how much of it each rank would hold.

An extract is a merge of one expert, the mean of one, written as an adapter of a rank.
"""

import contextlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..device import choose_device
from ..hub.patience import MERGING_S, PATIENCE
from ..planning.plan import Options, Plan, PlannedTensor, RefusedPlan, plan_merge
from ..recipe import Recipe
from ..run.events import Analysed, Event, Finished, Planned, TensorMerged
from ..run.merging import Merger
from ..run.pieces import Piece
from ..run.processes import Processes
from ..run.progress import Progress
from ..run.reading import reads
from ..run.shards import Branch, Run, merge_shards, report_of
from ..sinks import DroppingSink
from ..sinks.publication import Publication
from ..sources.adapter import Adapter


def plan_extract(
    recipe: Recipe,
    options: Options,
    *,
    out: str | Path | None = None,
    publication: Publication | None = None,
    work_dir: str | Path | None = None,
    update: bool = False,
) -> Plan | RefusedPlan:
    """Plan an extract; as `plan_merge`, whose arguments these are.

    Args:
        recipe: a base and one expert: a whole model, a merge or an adapter; the method is mean's.
        options: with the rank of an adapter.
        out, publication, work_dir, update: where it goes, and over what.
    """
    recipe, options = (
        replace(recipe, method="mean", parameters={}),
        replace(options, output="adapter"),
    )
    return plan_merge(
        recipe, options, out=out, publication=publication, work_dir=work_dir, update=update
    )


def kept_by_rank(plan: Plan | RefusedPlan) -> Iterator[Event]:
    """Find what each rank would hold, and write nothing; the last event's report says it.

    ``adapter`` there is that of a merge's report. ``outside`` names the tensors that differ and
    that the adapter does not hold (embeddings, norms, biases), and says which share of the squared
    length of all that differs is theirs; None where nothing differs.

    Args:
        plan: from `plan_extract`.

    Raises:
        PlanRefusedError: the plan is refused.
        NonFiniteError: a weight is NaN or infinite.
        StoppedError: the sources cannot be read.

    Memory: `plan.peak_memory_bytes`.
    """
    plan = plan.accepted()
    whole = plan_merge(
        plan.recipe, replace(plan.options, output="model", adapter_rank=None), like=plan
    ).accepted()
    outside = [
        tensor
        for name, tensor in whole.tensors.items()
        if tensor.rule
        and name not in plan.tensors
        # It may have other values, as far as headers tell.
        and not all(isinstance(e, Adapter) and name not in e.edits for e in plan.experts)
    ]
    read = sum(nbytes for nbytes, _ in reads(outside)) + plan.read_bytes
    yield Planned(plan=plan.to_dict() | {"read_bytes": read})
    progress = Progress(lambda: 0)
    merger = Merger(plan, choose_device(plan.options.device), sample=progress.peak.look)
    run = Run([Branch(plan, DroppingSink(), merger)], progress)
    with PATIENCE.of(plan.options.patience or MERGING_S), progress.peak.watched():
        for event in merge_shards(run, Processes()):
            if isinstance(event, TensorMerged):
                yield Analysed(tensor=event.tensor, bytes_read=event.bytes_read)
        energies: dict[str, float] = {}
        for nbytes, name, energy in _energies(whole, outside):
            progress.bytes_read += nbytes
            energies[name] = energies.get(name, 0.0) + energy
            yield Analysed(tensor=name, bytes_read=progress.bytes_read)
    progress.bytes_written = 0
    report = report_of(run, run.branches[0], Processes()) | {"files": []}
    yield Finished(where="", report=report | {"outside": _outside(report["tensors"], energies)})


def _energies(plan: Plan, tensors: list[PlannedTensor]) -> Iterator[tuple[int, str, float]]:
    """Yield bytes that were read, the tensor, and ‖ΔW‖² of some rows of it."""
    merger = Merger(plan, choose_device(plan.options.device))

    def energy(piece: Piece) -> float:
        with merger.naming(piece.tensor):
            _, vectors = merger.open(piece)
            with contextlib.closing(vectors):
                return float(vectors.gram().sum())

    with contextlib.closing(merger.each(tensors, energy)) as each:
        for piece, found in filter(None, each):
            yield piece.nbytes, piece.tensor.spec.name, found


def _outside(entries: list[dict[str, Any]], energies: Mapping[str, float]) -> dict[str, Any] | None:
    """Return the tensors that differ and that the adapter lacks, and their share of it all."""
    lost = math.fsum(energies.values())
    total = lost + math.fsum((entry["update_norm"] or 0.0) ** 2 for entry in entries)
    if total == 0:
        return None
    return {
        "tensors": [name for name, energy in energies.items() if energy > 0],
        "share": lost / total,
    }
