"""Counting passes: numbers of the whole model that a method needs before it merges.

TIES ranks every weight of the model, RAM+ counts shared changes, LiNeS and OPCM compare norms.
Counts are sums over tensors that do not depend on the order, so a resumed run and another shard
size find the same; they are kept in the work folder, so that a resumed run need not count again.
"""

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from .errors import StoppedError
from .events import Counted, Event
from .merging import Merger, matrices, site_of
from .pipes import ReadAhead
from .plan import Plan, PlannedTensor
from .task_vectors import NonFiniteValues, TaskVectors, Workspace


class Piece(Protocol):
    """Some rows of a tensor, read."""

    tensor: Any
    start_row: int
    stop_row: int
    is_last: bool
    buffers: list[memoryview]


def counted(
    plans: Sequence[Plan],
    device: torch.device,
    read: Callable[[list[PlannedTensor]], ReadAhead[Any]],
    store: Path,
) -> Iterator[Event]:
    """Fill in `Plan.counted` of plans over the same sources, reading these once a pass.

    Args:
        plans: without problems, one a method.
        device: where to count.
        read: starts reading tensors ahead, in pieces, those of the base's order.
        store: file that keeps the counts for a later run of the same plans.

    Raises:
        NonFiniteError: a weight is NaN or infinite.
        StoppedError: the store cannot be written.
    """
    passes = [plan.opened[1].counting_passes() for plan in plans]
    if not max(passes, default=0) or _restore(plans, store):
        return
    workspace = Workspace(device)
    bytes_read = 0
    for number in range(max(passes)):
        asking = [plan for plan, count in zip(plans, passes, strict=True) if number < count]
        counters = [
            plan.opened[1].counter(number, plan.counted, len(plan.experts)) for plan in asking
        ]
        reader = read([tensor for tensor in plans[0].tensors.values() if tensor.rule])
        try:
            for piece in reader:
                bytes_read += sum(len(buffer) for buffer in piece.buffers)
                for plan, counter in zip(asking, counters, strict=True):
                    _count(plan, counter, piece, workspace)
                if piece.is_last:
                    yield Counted(
                        tensor=piece.tensor.spec.name,
                        number=number + 1,
                        passes=max(passes),
                        bytes_read=bytes_read,
                    )
        finally:
            reader.close()
        for plan, counter in zip(asking, counters, strict=True):
            plan.counted |= counter.result()
    _keep(plans, store)


def _count(plan: Plan, counter: Any, piece: Piece, workspace: Workspace) -> None:
    tensor = plan.tensors[piece.tensor.spec.name]
    if tensor.rule is None:
        return
    spec, rule = tensor.spec, tensor.rule
    rows = (piece.start_row, piece.stop_row)
    for base_row, raw in matrices(plan, spec, rule, *rows, piece.buffers):
        resident = rule.needs_matrix and tensor.resident
        try:
            vectors = TaskVectors(raw[0], raw[1:], workspace, resident=resident)
            counter.add(vectors, site_of(plan, spec, rule, base_row))
        except NonFiniteValues as exc:
            raise Merger(plan, workspace.device).non_finite(spec, exc.source) from exc


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
