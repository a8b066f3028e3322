"""Whether the experts are experts of the base: looked at before anything is written.

One at least has to differ from it, and none may have nothing in common with it.

The plan reads no weights, so it tells equal models by their files alone. A few rows of a tensor or
two settle nearly every merge; whole tensors are read only where all of those rows are equal.
"""

import contextlib
import math
import time
from collections.abc import Generator, Iterator
from functools import partial
from pathlib import Path
from statistics import median

import torch

from ..errors import PlanRefusedError, Remedy
from ..maths.task_vectors import NonFiniteValues
from ..memory import BLOCK_ELEMENTS
from ..planning.compat import NOTHING_DIFFERS, UNRELATED
from ..planning.plan import Plan, PlannedTensor
from ..roles import MATRIX_ROLES, pattern_of
from ..sinks import target_state
from ..sources.adapter import Adapter
from .events import Event, Planned, Progressed
from .merging import Merger
from .pieces import Piece
from .reading import rows_of

# Stored bytes of a tensor that are looked at first, where a row (of a stack, a matrix) has no more.
_SAMPLE_BYTES = 100_000
# Tensors that are looked into so, beside one of each pattern of names.
_SAMPLES = 16
# Matrices of which some rows are compared with the base's.
_COMPARED = 5
# Cosine of an expert's rows with the base's below which it was not trained from it. Two models that
# began at random have 0, up to 0.02 in what is sampled of a matrix; trained on, models keep more
# than 0.9, and the built-in experts with an update of 30 times its length 0.93.
_UNRELATED = 0.1
# Of fewer values in all that were compared the cosine of two models is not near enough to 0.
_LEAST_VALUES = 3000
_TICK_S = 1.0


def refused_if_equal(plan: Plan, planned: Planned) -> Generator[Event, None, bool]:
    """Refuse a merge in which no value differs, or of an expert that is none of the base.

    Args:
        plan: without problems.
        planned: the run's first event. It is yielded where whole tensors have to be read, which
            takes its time and is told once a second; the value says whether it was.

    Raises:
        PlanRefusedError: nothing differs; or an expert was not trained from the base, and nobody
            said that it is to be merged all the same.
        StoppedError: a source cannot be read.

    Memory: no more than the merge.
    """
    tensors = [tensor for tensor in plan.tensors.values() if tensor.rule and tensor.experts]
    if not tensors:
        return False  # one model alone
    merger = Merger(plan, torch.device("cpu"))
    refuse_unrelated(plan, merger, tensors)
    # A union has rows that only some of the models have: it differs from the base.
    has_more_rows = bool(plan.recipe.tokenizer and plan.recipe.tokenizer.source == "union")
    is_told = has_more_rows or any(_differs(merger, rows) for rows in _samples(tensors))
    for expert in plan.experts:
        if isinstance(expert, Adapter):
            expert.forget()  # factors stay in memory until a merge is done with their tensor
    if is_told:
        return False
    yield planned
    if (yield from _any_differs(tensors, merger)):
        return True
    raise PlanRefusedError(
        f"every value of every expert is that of {plan.layout.id}: nothing differs, so there is "
        "nothing to merge.",
        Remedy.TRAINED_EXPERTS,
        kind=NOTHING_DIFFERS,
    )


def refuse_unrelated(plan: Plan, merger: Merger, tensors: list[PlannedTensor]) -> None:
    """Refuse experts whose matrices point nowhere near the base's, or the first model's.

    Args:
        plan: without problems.
        merger: reads its tensors.
        tensors: those that experts take part in.

    Raises:
        PlanRefusedError: there is one, and nobody said that it is to be merged all the same.
    """
    if plan.options.unrelated == "merge":
        return
    matrices = [t for t in tensors if t.rule and t.rule.role in MATRIX_ROLES and t.reads_layout]
    cosines: dict[int, list[float]] = {}
    compared = 0
    for piece in _samples(matrices[:: max(len(matrices) // _COMPARED, 1)][:_COMPARED]):
        compared += math.prod(piece.matrix_shape)
        for number, cosine in zip(piece.tensor.experts, _cosines(merger, piece), strict=False):
            cosines.setdefault(number, []).append(cosine)
    if compared < _LEAST_VALUES:
        return
    strangers = [
        plan.experts[number].id
        for number, found in sorted(cosines.items())
        if median(found) < _UNRELATED
    ]
    whose = (
        "the base's, so that its difference to the base is longer than the base itself. Give "
        "experts of this base, or their base"
        if plan.base is not None
        else "that one's. Give models that were trained from one base"
    )
    if strangers:
        raise PlanRefusedError(
            f"{', '.join(strangers)}: not trained from {plan.layout.id}. Its matrices have the "
            f"same shapes, but nothing in common with {whose}.",
            Remedy.MERGE_UNRELATED,
            kind=UNRELATED,
        )


def _cosines(merger: Merger, piece: Piece) -> list[float]:
    """Return the cosine of each expert's rows with the base's; none where a length is zero."""
    try:
        _, vectors = merger.open(piece)
        with contextlib.closing(vectors):
            rows = vectors.blocks()[0]
            # Of a row that is longer than a block its beginning: in float64 it is held some times.
            base = vectors.base(rows)[:, :BLOCK_ELEMENTS].double()
            updates = vectors.stack(rows)[:, :, :BLOCK_ELEMENTS]
    except NonFiniteValues:
        return []  # the merge says of which model
    found = []
    for update in updates:  # one at a time: of many experts float64 would not fit
        weights = base + update
        length = float(weights.norm() * base.norm())
        if not length > 0:
            return []
        found.append(float((weights * base).sum()) / length)
    return found


def is_begun(plan: Plan, out: Path | None) -> bool:
    """Return whether an earlier run of a plan left shards, so that something differs for sure."""
    in_folder = out is not None and target_state(out, plan.plan_hash).bytes_there > 0
    return in_folder or (plan.target is not None and plan.target.bytes_staged > 0)


def _samples(tensors: list[PlannedTensor]) -> Iterator[Piece]:
    """Yield some rows from the middle: of matrices first, which training moves if anything."""
    by_pattern = {pattern_of(tensor.spec.name): tensor for tensor in tensors}
    evenly = tensors[:: max(-(-len(tensors) // _SAMPLES), 1)]
    chosen = {tensor.spec.name: tensor for tensor in (*by_pattern.values(), *evenly)}
    for tensor in sorted(chosen.values(), key=lambda tensor: not tensor.is_decomposed):
        rows, _ = tensor.spec.matrix_shape
        if tensor.spec.numel:
            fitting = max(_SAMPLE_BYTES * rows // max(tensor.spec.nbytes, 1), 1)
            count = 1 if tensor.is_stack else min(fitting, rows)  # of a stack, one matrix
            start = (rows - count) // 2
            yield rows_of(tensor, slice(start, start + count))


def _any_differs(tensors: list[PlannedTensor], merger: Merger) -> Generator[Event, None, bool]:
    """Return whether anything differs in whole tensors; read as a merge reads them."""
    started, nbytes = time.monotonic(), 0

    def read(count: int) -> None:
        nonlocal nbytes
        nbytes += count

    each = merger.each(tensors, partial(_differs, merger), on_read=read, tick=_TICK_S)
    with contextlib.closing(each):
        for done in each:
            if done is None:
                yield Progressed(bytes_read=nbytes, seconds=time.monotonic() - started)
            elif done[1]:
                return True
    return False


def _differs(merger: Merger, piece: Piece) -> bool:
    try:
        _, vectors = merger.open(piece)
        with contextlib.closing(vectors):
            return not vectors.is_zero()
    except NonFiniteValues:
        return True  # the merge says of which model
