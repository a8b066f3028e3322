"""Counting passes: numbers of the whole model that a method needs before it merges.

TIES ranks every weight of the model, RAM+ counts shared changes, LiNeS and OPCM compare norms.
Counts are sums over tensors that do not depend on the order, so a resumed run and another shard
size find the same; they are kept in the work folder, so that a resumed run need not count again.
"""

import contextlib
import json
import uuid
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..documents import load_json
from ..errors import StoppedError
from ..maths.cores import Cores
from ..methods.base import Counter
from ..planning.plan import Plan
from ..sinks.durable import write_durably
from .events import Counted, Event
from .merging import Merger
from .pieces import Piece
from .pipeline import threads_of, worked_ahead
from .reading import READ_AHEAD_BYTES, Shared, reading_ahead_of, shared_order, shared_reads


def counted(
    plans: Sequence[Plan], device: torch.device, store: Path
) -> Generator[Event, None, list[dict[str, Any]]]:
    """Make the counting passes of plans over the same sources; the value is what each found.

    Args:
        plans: without problems, one a method.
        device: where the arithmetic happens.
        store: file that keeps the counts for a later run of the same plans.

    Raises:
        NonFiniteError: a weight is NaN or infinite.
        StoppedError: the store cannot be written.
    """
    found: list[dict[str, Any]] = [{} for _ in plans]
    passes = [plan.method.counting_passes() for plan in plans]
    if not max(passes, default=0):
        return found
    restored = _restored(plans, store)
    if restored is not None:
        return restored
    bytes_read = 0
    for number in range(max(passes)):
        asking = {i: plans[i] for i, count in enumerate(passes) if number < count}
        cores = Cores(threads_of(plans[0]))
        mergers = {i: Merger(plan, device, found[i], cores=cores) for i, plan in asking.items()}
        counters = {
            i: plan.method.counter(number, found[i], len(plan.experts))
            for i, plan in asking.items()
        }
        with contextlib.closing(_counting(asking, mergers, counters)) as pieces:
            for piece in pieces:
                bytes_read += piece.nbytes
                if piece.is_last:
                    yield Counted(
                        tensor=piece.tensor.spec.name,
                        number=number + 1,
                        passes=max(passes),
                        bytes_read=bytes_read,
                    )
        for i, counter in counters.items():
            found[i] |= counter.result()
    document = {"identity": _identity(plans), "counted": list(found)}
    try:
        store.parent.mkdir(parents=True, exist_ok=True)
        write_durably(store, json.dumps(document).encode(), by=uuid.uuid4().hex)
    except OSError as exc:
        raise StoppedError(f"cannot write {str(store)!r}: {exc.strerror}.") from exc
    return found


def _counting(
    plans: Mapping[int, Plan], mergers: Mapping[int, Merger], counters: Mapping[int, Counter]
) -> Generator[Piece, None, None]:
    """Count everything that is merged, in one thread; yield the pieces."""
    first = next(iter(plans.values()))
    names = [name for name, tensor in first.tensors.items() if tensor.rule]

    def count(shared: Shared[int]) -> Piece:
        piece = shared.lead_piece
        lead = mergers[shared.lead]
        with lead.naming(piece.tensor):
            _, vectors = lead.open(piece)
            for i, own in shared.pieces.items():
                if own.tensor.rule is not None:
                    counters[i].add(vectors, mergers[i].site(own, own.tensor.rule))
            vectors.close()
        piece.release(slice(0, piece.matrix_shape[0]))
        return piece

    with reading_ahead_of(first, shared_order(plans, names)):
        chain = worked_ahead(
            shared_reads(plans, names),
            count,
            read_bytes=first.read_ahead_bytes or READ_AHEAD_BYTES,
            work_bytes=first.working_bytes,
            cost=lambda shared: shared.lead_piece.tensor.working_bytes,
            cores=mergers[min(mergers)].cores,
            workers=1,  # counters add up in no particular order, but not in two threads at once
        )
        with contextlib.closing(chain):
            for piece in chain:
                if piece is not None:
                    yield piece


def _identity(plans: Sequence[Plan]) -> list[Any]:
    sources = [[source.id, source.identity] for source in plans[0].checkpoints]
    return [[plan.plan_hash for plan in plans], sources]


def _restored(plans: Sequence[Plan], store: Path) -> list[dict[str, Any]] | None:
    """Return what an earlier run of the same plans counted, or None."""
    try:
        document = load_json(store.read_bytes())
        if document["identity"] != json.loads(json.dumps(_identity(plans))):
            return None
        found = [dict(one) for one in document["counted"]]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return found if len(found) == len(plans) else None
