"""Fitting a plan into memory: what lives at once, what is read ahead, what cannot fit. No torch."""

import math
from dataclasses import dataclass, replace

from ..device import available_memory, machine_share
from ..errors import Findings, NotEnoughMemoryError, Remedy
from ..memory import (
    FIXED_BYTES,
    HUB_WINDOW_BYTES,
    KEPT_OUTPUT_BYTES,
    LEAST_HUB_WINDOW_BYTES,
    SPARE_BYTES,
    WRITE_QUEUE_BYTES,
)
from ..units import format_size
from .planned import Plan, PlannedTensor

# Of the free memory, without --memory-budget.
SHARE = 0.8


@dataclass(frozen=True, kw_only=True, slots=True)
class Fit:
    """A plan in so much memory.

    Attributes:
        room: bytes of the budget for what is in work; less than `worst` does not fit.
        read_ahead_bytes: on their way from the Hub.
        resident: the tensors of which float32 copies of all experts may live at once.
        worst: bytes of the tensor that takes most.
        worst_name: its name.
        needed_bytes: of memory, at least.
    """

    room: int
    read_ahead_bytes: int
    resident: frozenset[str]
    worst: int
    worst_name: str
    needed_bytes: int


def fit(plan: Plan, budget: int, *, elsewhere: bool = False) -> Fit:
    """Return how a plan does with a budget: how many float32 copies of which matrix live at once.

    Args:
        plan: with its tensors decided; nothing in it is changed.
        budget: bytes of private memory.
        elsewhere: on another machine, where no repository is in the local cache.
    """
    shared = max((t.method.shared_scratch_bytes(*t.matrix) for t in _matrices(plan)), default=0)
    room = budget - FIXED_BYTES - WRITE_QUEUE_BYTES - KEPT_OUTPUT_BYTES - shared
    ahead = _read_ahead(plan, room, elsewhere=elsewhere)
    room -= ahead.bytes
    worst, resident = (0, ""), set()
    for name, tensor in plan.tensors.items():
        size = plan.working_bytes_of(replace(tensor, resident=True))
        if size <= room:
            resident.add(name)
        else:
            size = plan.working_bytes_of(replace(tensor, resident=False))
        worst = max(worst, (size, name))
    # A second of the largest pieces, so that the line need not wait while the first is merged.
    # Only of memory that was asked for.
    is_asked = plan.options.memory_budget is not None
    if is_asked and ahead.largest > ahead.window and room - ahead.largest >= worst[0]:
        ahead = replace(ahead, window=ahead.window + ahead.largest)
        room -= ahead.largest
    return Fit(
        room=room,
        read_ahead_bytes=ahead.bytes,
        resident=frozenset(resident),
        worst=worst[0],
        worst_name=worst[1],
        needed_bytes=budget - room + worst[0],
    )


def fit_memory(plan: Plan, found: Findings) -> Plan:
    """Choose for every matrix how many float32 copies live at once; refuse what cannot fit.

    What may be in work at once (`working_bytes`) is bounded by the largest matrix, not by what the
    machine has, unless the user gave a budget. Processes on one machine share its budget.
    """
    asked = plan.options.memory_budget
    free = plan.machine.memory_bytes if plan.machine is not None else available_memory()
    sharing = machine_share()[1] if plan.machine is None else 1
    budget = (asked if asked is not None else int(free * SHARE)) // sharing
    fitted = fit(plan, budget, elsewhere=plan.machine is not None)
    ample = SPARE_BYTES + max((_ample_bytes(plan, tensor) for tensor in _matrices(plan)), default=0)
    room = fitted.room
    working = max(fitted.worst, min(room, ample) if asked is None else room)
    if fitted.worst > room:
        needed = fitted.needed_bytes
        which = "the memory budget" if asked is not None else "80 % of the free memory"
        each = "" if sharing == 1 else f" for each of the {sharing} processes here"
        found.problem(
            f"merging {fitted.worst_name} needs {format_size(needed)} of memory, but {which} is "
            f"{format_size(budget)}{each}.",
            Remedy.MORE_MEMORY,
            *([Remedy.FEWER_PROCESSES] if each else []),
            kind=NotEnoughMemoryError.kind,
            needed=f"{-(-needed * sharing // 1_000_000)}MB",
        )
    return replace(
        plan,
        tensors={
            name: replace(tensor, resident=name in fitted.resident)
            for name, tensor in plan.tensors.items()
        },
        memory_budget=budget,
        read_ahead_bytes=fitted.read_ahead_bytes,
        working_bytes=working,
        peak_memory_bytes=budget - room + working,
    )


def _ample_bytes(plan: Plan, tensor: PlannedTensor) -> int:
    """Return bytes in which two workers need not wait for each other at a tensor of its size."""
    if plan.is_factored(tensor):
        return 2 * plan.working_bytes_of(tensor)
    return 4 * (len(plan.experts) + 2) * math.prod(tensor.matrix)


def _matrices(plan: Plan) -> list[PlannedTensor]:
    return [t for t in plan.tensors.values() if t.rule and t.rule.needs_matrix]


@dataclass(frozen=True, slots=True)
class _Ahead:
    """Private memory for what is read ahead: bytes of the largest piece, and of a window."""

    largest: int
    window: int

    @property
    def bytes(self) -> int:
        """Both together."""
        return self.largest + self.window


def _read_ahead(plan: Plan, room: int, *, elsewhere: bool) -> _Ahead:
    """Return how much is read ahead.

    Pages of mapped files are not private; what comes from the Hub is, and what is made when it is
    read (dequantised, put together).
    """
    remote = [
        source
        for source in plan.checkpoints
        if source.is_remote or (elsewhere and source.folder is None)
    ]
    largest = 0
    for name, tensor in plan.tensors.items():
        rows = tensor.rows_read
        fetched = sum(
            source.read_cost(name, 0, rows) for source in plan.read_for(tensor) if source in remote
        )
        largest = max(largest, fetched + plan.made_bytes_of(tensor))
    if not largest:
        return _Ahead(0, 0)
    window = min(HUB_WINDOW_BYTES, max(LEAST_HUB_WINDOW_BYTES, (room - largest) // 3))
    return _Ahead(largest, window)
