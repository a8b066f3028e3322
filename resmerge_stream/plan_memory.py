"""Fitting a plan into memory: what lives at once, what is read ahead, what cannot fit. No torch."""

from .compat import Findings
from .device import available_memory
from .errors import NotEnoughMemoryError
from .memory import (
    FIXED_BYTES,
    HUB_WINDOW_BYTES,
    LEAST_HUB_WINDOW_BYTES,
    PIECE_BYTES,
    SPARE_BYTES,
    WRITE_QUEUE_BYTES,
)
from .planned import Plan, PlannedTensor, matrix_of
from .specs import DTYPES, format_size


def fit_memory(plan: Plan, found: Findings) -> None:
    """Choose for every matrix how many float32 copies live at once; refuse what cannot fit.

    What may be in work at once (`working_bytes`) is bounded by the largest matrix, not by what the
    machine has, unless the user gave a budget.
    """
    asked = plan.options.memory_budget
    plan.memory_budget = asked if asked is not None else int(available_memory() * 0.8)
    count = len(plan.experts)
    matrices = [
        matrix_of(tensor.spec)
        for tensor in plan.tensors.values()
        if tensor.rule and tensor.rule.needs_matrix
    ]
    shared = max((plan.opened[1].shared_scratch_bytes(m, n) for m, n in matrices), default=0)
    room = plan.memory_budget - FIXED_BYTES - WRITE_QUEUE_BYTES - shared
    plan.read_ahead_bytes = _read_ahead_bytes(plan, room)
    room -= plan.read_ahead_bytes
    largest = max((m * n for m, n in matrices), default=0)
    worst, fitted = (0, ""), {}
    for name, tensor in plan.tensors.items():
        resident = plan.working_bytes_of(tensor) <= room
        fitted[name] = PlannedTensor(tensor.spec, tensor.rule, resident)
        worst = max(worst, (plan.working_bytes_of(fitted[name]), name))
    plan.tensors = fitted
    ample = SPARE_BYTES + 4 * (count + 2) * largest
    plan.working_bytes = max(worst[0], min(room, ample) if asked is None else room)
    plan.peak_memory_bytes = plan.memory_budget - room + plan.working_bytes
    if worst[0] > room:
        needed = plan.memory_budget - room + worst[0]
        which = "--memory-budget allows" if asked is not None else "80 % of the free memory is"
        error = NotEnoughMemoryError(
            f"merging {worst[1]} needs {format_size(needed)} of memory, but {which} "
            f"{format_size(plan.memory_budget)}. Give --memory-budget "
            f"{-(-needed // 1_000_000)}MB or more, on a machine that has it."
        )
        found.problems.append(str(error))


def _read_ahead_bytes(plan: Plan, room: int) -> int:
    """Return bytes for what is on its way from the Hub: the largest piece, and a window ahead."""
    remote = [source for source in plan.checkpoints if source.is_remote]
    if not remote:
        return 0
    largest = 0
    for name, tensor in plan.tensors.items():
        m, n = matrix_of(tensor.spec)
        for_matrix = tensor.rule is not None and tensor.rule.needs_matrix
        rows = 1.0 if for_matrix else min(1.0, PIECE_BYTES / max(tensor.spec.nbytes, 1))
        stored = sum(
            m * n * DTYPES[source.tensors[name].spec.dtype].nbytes
            for source in remote
            if name in source.tensors
        )
        largest = max(largest, int(stored * rows))
    window = min(HUB_WINDOW_BYTES, max(LEAST_HUB_WINDOW_BYTES, (room - largest) // 3))
    return largest + window
