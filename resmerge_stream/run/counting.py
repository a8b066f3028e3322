"""Counting passes: numbers of the whole model that a method needs before it merges.

TIES ranks every weight of the model, RAM+ counts shared changes, LiNeS and OPCM compare norms.
Counts are sums over tensors that do not depend on the order, so a resumed run and another shard
size find the same; they are kept in the work folder, so that a resumed run need not count again.
"""

import contextlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import StoppedError
from ..maths.task_vectors import NonFiniteValues
from ..methods.base import Counter
from ..pipes import Ahead
from ..planning.plan import Plan
from .events import Counted, Event
from .merging import Merger
from .reading import READ_AHEAD_BYTES, reading_ahead_of, reads
from .sharing import Shared, shared_order, shared_reads


def counted(plans: Sequence[Plan], mergers: Sequence[Merger], store: Path) -> Iterator[Event]:
    """Fill in `Plan.counted` of plans over the same sources.

    Args:
        plans: without problems, one a method.
        mergers: of the plans.
        store: file that keeps the counts for a later run of the same plans.

    Raises:
        NonFiniteError: a weight is NaN or infinite.
        StoppedError: the store cannot be written.
    """
    passes = [plan.opened[1].counting_passes() for plan in plans]
    if not max(passes, default=0) or _restore(plans, store):
        return
    bytes_read = 0
    for number in range(max(passes)):
        asking = [i for i, count in enumerate(passes) if number < count]
        counters = {
            i: plans[i].opened[1].counter(number, plans[i].counted, len(plans[i].experts))
            for i in asking
        }
        for shared in _pieces({i: plans[i] for i in asking}):
            bytes_read += sum(len(buffer) for buffer in shared.lead_piece.buffers)
            _count(shared, mergers, counters)
            if shared.lead_piece.is_last:
                name = shared.lead_piece.tensor.spec.name
                yield Counted(
                    tensor=name, number=number + 1, passes=max(passes), bytes_read=bytes_read
                )
        for i, counter in counters.items():
            plans[i].counted |= counter.result()
    _keep(plans, store)


def _pieces(plans: Mapping[int, Plan]) -> Iterator[Shared[int]]:
    """Yield everything that is merged, read ahead."""
    first = next(iter(plans.values()))
    names = [name for name, tensor in first.tensors.items() if tensor.rule]
    with reading_ahead_of(first, shared_order(plans, names)):
        limit = first.read_ahead_bytes or READ_AHEAD_BYTES
        reader = Ahead(shared_reads(plans, names, reads), limit)
        try:
            for held in reader:
                yield held.value
                held.release()
        finally:
            reader.close()


def _count(shared: Shared[int], mergers: Sequence[Merger], counters: Mapping[int, Counter]) -> None:
    lead = mergers[shared.lead]
    try:
        _, vectors = lead.open(shared.lead_piece)
        for i, piece in shared.pieces.items():
            counters[i].add(vectors, mergers[i].site(piece))
        vectors.close()
    except NonFiniteValues as exc:
        raise lead.non_finite(shared.lead_piece.tensor, exc.source) from exc
    shared.lead_piece.release(slice(0, shared.lead_piece.matrix_shape[0]))
    shared.lead_piece.close()


def _identity(plans: Sequence[Plan]) -> list[Any]:
    sources = [[source.id, source.identity] for source in plans[0].checkpoints]
    return [[plan.plan_hash for plan in plans], sources]


def _restore(plans: Sequence[Plan], store: Path) -> bool:
    try:
        document = json.loads(store.read_text(encoding="utf-8"))
        if document["identity"] != json.loads(json.dumps(_identity(plans))):
            return False
        for plan, found in zip(plans, document["counted"], strict=True):
            plan.counted = dict(found)
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return True


def _keep(plans: Sequence[Plan], store: Path) -> None:
    document = {"identity": _identity(plans), "counted": [plan.counted for plan in plans]}
    temporary = store.with_suffix(".tmp")
    try:
        store.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(document), encoding="utf-8")
        os.replace(temporary, store)
    except OSError as exc:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise StoppedError(f"cannot write {str(store)!r}: {exc.strerror}.") from exc
