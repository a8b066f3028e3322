"""A whole model as a LoRA adapter of its base, and how much of it each rank would hold.

An extract is a merge of one expert, the mean of one, written as an adapter of a rank.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from ..device import choose_device
from ..planning.plan import Options, Plan, PlannedTensor, RefusedPlan, plan_merge
from ..recipe import Recipe
from ..report.build import build_report
from ..report.rows import Rows
from ..run.engine import environment
from ..run.events import Analysed, Event, Finished, Planned
from ..run.merging import Merged, Merger, reported
from ..run.pieces import Piece
from ..run.pipeline import worked_ahead, workers
from ..run.reading import READ_AHEAD_BYTES, reading_ahead_of, reads
from ..sinks.publication import Publication
from ..sources.adapter import AdapterCheckpoint

T = TypeVar("T")


def plan_extract(
    recipe: Recipe,
    options: Options,
    *,
    out: str | Path | None = None,
    publication: Publication | None = None,
    work_dir: str | Path | None = None,
) -> Plan | RefusedPlan:
    """Plan an extract; as `plan_merge`, whose arguments these are.

    Args:
        recipe: a base and one expert: a whole model, a merge or an adapter; the method is mean's.
        options: with the rank of an adapter.
        out, publication, work_dir: where it goes.
    """
    recipe, options = (
        replace(recipe, method="mean", parameters={}),
        replace(options, output="adapter"),
    )
    return plan_merge(recipe, options, out=out, publication=publication, work_dir=work_dir)


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
        if tensor.rule and name not in plan.tensors and _may_differ(plan, name)
    ]
    read = sum(nbytes for nbytes, _ in reads(whole, outside)) + plan.read_bytes
    yield Planned(plan=plan.to_dict() | {"read_bytes": read})
    entries: list[dict[str, Any]] = []
    done = 0
    for nbytes, entry in _rows(plan):
        done += nbytes
        entries.append(entry)
        yield Analysed(tensor=entry["name"], bytes_read=done)
    energies: dict[str, float] = {}
    for nbytes, name, energy in _energies(whole, outside):
        done += nbytes
        energies[name] = energies.get(name, 0.0) + energy
        yield Analysed(tensor=name, bytes_read=done)
    report = build_report(
        plan, {}, entries, [], environment=environment(choose_device(plan.options.device)),
        seconds=0.0, bytes_read=done, bytes_written=0, peak_private_bytes=0,
    )  # fmt: skip
    yield Finished(where="", report=report | {"outside": _outside(entries, energies)})


def _rows(plan: Plan) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield bytes that were read for each module, and its row of the report."""
    merger, rows = Merger(plan, choose_device(plan.options.device)), Rows(len(plan.experts))
    tensors = [tensor for shard in plan.shards for tensor in plan.written_in(shard)]
    for piece, prepared in _each(plan, tensors, merger, merger.prepare):
        entry = reported(rows, prepared, prepared.kept) if isinstance(prepared, Merged) else None
        if entry is not None:
            yield piece.nbytes, entry


def _energies(plan: Plan, tensors: list[PlannedTensor]) -> Iterator[tuple[int, str, float]]:
    """Yield bytes that were read, the tensor, and ‖ΔW‖² of some rows of it."""
    merger = Merger(plan, choose_device(plan.options.device))

    def energy(piece: Piece) -> float:
        with merger.naming(piece.tensor):
            _, vectors = merger.open(piece)
            with contextlib.closing(vectors):
                return float(vectors.gram().sum())

    for piece, found in _each(plan, tensors, merger, energy):
        yield piece.nbytes, piece.tensor.spec.name, found


def _each(
    plan: Plan, tensors: list[PlannedTensor], merger: Merger, work: Callable[[Piece], T]
) -> Iterator[tuple[Piece, T]]:
    """Yield every piece of some tensors and what the work makes of it, in order."""
    chain = worked_ahead(
        reads(plan, tensors),
        lambda piece: (piece, work(piece)),
        read_bytes=plan.read_ahead_bytes or READ_AHEAD_BYTES,
        work_bytes=plan.working_bytes,
        cost=lambda piece: plan.working_bytes_of(piece.tensor),
        workers=workers(merger.device),
        cores=merger.cores,
    )
    with reading_ahead_of(plan, tensors), contextlib.closing(chain):
        yield from filter(None, chain)


def _may_differ(plan: Plan, name: str) -> bool:
    """Return whether the model may have other values of a tensor, as far as headers tell."""
    return any(
        not isinstance(expert, AdapterCheckpoint) or name in expert.edits for expert in plan.experts
    )


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
