"""Whether any model of a plan differs from its layout: looked at before anything is written.

The plan reads no weights, so it tells equal models by their files alone. A few rows of a tensor or
two settle nearly every merge; whole tensors are read only where all of those rows are equal.
"""

import contextlib
import time
from collections.abc import Generator, Iterator
from functools import partial
from pathlib import Path

import torch

from ..errors import PlanRefusedError, Remedy
from ..maths.task_vectors import NonFiniteValues
from ..planning.compat import NOTHING_DIFFERS
from ..planning.plan import Plan, PlannedTensor
from ..roles import pattern_of
from ..sinks import target_state
from ..sources.adapter import AdapterCheckpoint
from .events import Event, Planned, Progressed
from .merging import Merger
from .pieces import Piece
from .pipeline import worked_ahead, workers
from .reading import READ_AHEAD_BYTES, reading_ahead_of, reads, rows_of

# Stored bytes of a tensor that are looked at first, where a row (of a stack, a matrix) has no more.
_SAMPLE_BYTES = 100_000
# Tensors that are looked into so, beside one of each pattern of names.
_SAMPLES = 16
_TICK_S = 1.0


def refused_if_equal(plan: Plan, planned: Planned) -> Generator[Event, None, bool]:
    """Refuse a merge in which no value differs; end at the first one that does.

    Args:
        plan: without problems.
        planned: the run's first event. It is yielded where whole tensors have to be read, which
            takes its time and is told once a second; the value says whether it was.

    Raises:
        PlanRefusedError: nothing differs.
        StoppedError: a source cannot be read.

    Memory: no more than the merge.
    """
    tensors = [tensor for tensor in plan.tensors.values() if tensor.rule and tensor.experts]
    if not tensors or (plan.recipe.tokenizer and plan.recipe.tokenizer.source == "union"):
        return False  # one model alone; or rows that only some of them have
    merger = Merger(plan, torch.device("cpu"))
    is_told = any(_differs(merger, rows) for rows in _samples(plan, tensors))
    for expert in plan.experts:
        if isinstance(expert, AdapterCheckpoint):
            expert.forget()  # factors stay in memory until a merge is done with their tensor
    if is_told:
        return False
    yield planned
    if (yield from _any_differs(plan, tensors, merger)):
        return True
    raise PlanRefusedError(
        f"every value of every expert is that of {plan.layout.id}: nothing differs, so there is "
        "nothing to merge.",
        Remedy.TRAINED_EXPERTS,
        kind=NOTHING_DIFFERS,
    )


def is_begun(plan: Plan, out: Path | None) -> bool:
    """Return whether an earlier run of a plan left shards, so that something differs for sure."""
    in_folder = out is not None and target_state(out, plan.plan_hash).bytes_there > 0
    return in_folder or (plan.target is not None and plan.target.bytes_staged > 0)


def _samples(plan: Plan, tensors: list[PlannedTensor]) -> Iterator[Piece]:
    """Yield some rows from the middle: of matrices first, which training moves if anything."""
    by_pattern = {pattern_of(tensor.spec.name): tensor for tensor in tensors}
    evenly = tensors[:: -(-len(tensors) // _SAMPLES)]
    chosen = {tensor.spec.name: tensor for tensor in (*by_pattern.values(), *evenly)}
    for tensor in sorted(chosen.values(), key=_is_no_map):
        rows, _ = tensor.spec.matrix_shape
        if tensor.spec.numel:
            fitting = max(_SAMPLE_BYTES * rows // max(tensor.spec.nbytes, 1), 1)
            count = 1 if tensor.is_stack else min(fitting, rows)  # of a stack, one matrix
            start = (rows - count) // 2
            yield rows_of(plan, tensor, start, start + count)


def _is_no_map(tensor: PlannedTensor) -> bool:
    return tensor.rule is None or not tensor.rule.needs_matrix


def _any_differs(
    plan: Plan, tensors: list[PlannedTensor], merger: Merger
) -> Generator[Event, None, bool]:
    """Return whether anything differs in whole tensors; read as a merge reads them."""
    started, nbytes = time.monotonic(), 0

    def read(count: int) -> None:
        nonlocal nbytes
        nbytes += count

    chain = worked_ahead(
        reads(plan, tensors),
        partial(_differs, merger),
        read_bytes=plan.read_ahead_bytes or READ_AHEAD_BYTES,
        work_bytes=plan.working_bytes,
        cost=lambda piece: plan.working_bytes_of(piece.tensor),
        workers=workers(merger.device),
        cores=merger.cores,
        on_read=read,
        tick=_TICK_S,
    )
    with reading_ahead_of(plan, tensors), contextlib.closing(chain):
        for found in chain:
            if found:
                return True
            if found is None:
                yield Progressed(bytes_read=nbytes, seconds=time.monotonic() - started)
    return False


def _differs(merger: Merger, piece: Piece) -> bool:
    try:
        _, vectors = merger.open(piece)
        with contextlib.closing(vectors):
            return not vectors.is_zero()
    except NonFiniteValues:
        return True  # the merge says of which model
