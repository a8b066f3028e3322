"""What a merge costs, from shapes, dtypes and ranks: memory, bytes read, time, disk. No torch.

Several plans over the same sources that are merged together, as a comparison does, cost what they
cost together. A merge is such a list of one.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..device import available_memory, machine_share, usable_cores
from ..errors import Findings, NotEnoughMemoryError, Remedy
from ..memory import (
    BLOCK_ELEMENTS,
    FIXED_BYTES,
    HELD_BYTES,
    HUB_WINDOW_BYTES,
    KEPT_OUTPUT_BYTES,
    LEAST_HUB_WINDOW_BYTES,
    PIECE_BYTES,
    SPARE_BYTES,
    WRITE_QUEUE_BYTES,
    block_bytes,
    sending_bytes,
    solver_bytes,
)
from ..specs import DTYPES, FP8_BLOCK
from ..units import format_size
from .parts import shares
from .planned import Plan, PlannedTensor

# Of the free memory, without --memory-budget.
SHARE = 0.8
# Seconds on two cores, measured (docs/performance.md): an element and model read; an element and
# whole expert whose leading direction is found; beside it, and for each row of the shorter side,
# every further direction, or all of them; an element and column that it is multiplied with, as of
# B·A; of factors, a row or column and rank squared.
_SECONDS_START = 3.0
_SECONDS_ROWS = 0.6e-9
_SECONDS_MATRIX = 4.5e-9
_SECONDS_DIRECTION = 9.0e-13
_SECONDS_SVD = 1.5e-10
_SECONDS_PRODUCT = 5.0e-11
_SECONDS_FACTORS = 3.0e-10
# Bytes a second from and to the Hub: a modest line; the two go on at the same time.
HUB_RATE = 50e6
# Bytes a second from and to a disk whose files are not in memory (a 7B group: 61 GB in 55 s), and
# the share of the shorter of reading and arithmetic that does not pass at the same time.
_DISK_RATE, _APART = 1.1e9, 0.4


@dataclass(frozen=True, kw_only=True, slots=True)
class Fit:
    """Plans in so much memory.

    Attributes:
        room: bytes of the budget for what is in work; less than `worst` does not fit.
        read_ahead_bytes: on their way from the Hub.
        working: of each tensor, bytes while a piece of it is in work.
        resident: the tensors of which float32 copies of all experts may live at once.
        worst: bytes of the tensor that takes most.
        worst_name: its name.
        needed_bytes: of memory, at least.
    """

    room: int
    read_ahead_bytes: int
    working: dict[str, int]
    resident: frozenset[str]
    worst: int
    worst_name: str
    needed_bytes: int


def fit(plans: Sequence[Plan], budget: int, *, elsewhere: bool = False) -> Fit:
    """Return how plans do with a budget: how many float32 copies of which matrix live at once.

    Args:
        plans: with their tensors decided, merged together; nothing in them is changed.
        budget: bytes of private memory.
        elsewhere: on another machine, where no repository is in the local cache.
    """
    shared = max(
        (t.method.shared_scratch_bytes(*t.matrix) for p in plans for t in p.tensors.values()
         if t.is_decomposed), default=0,
    )  # fmt: skip
    sent = sum(
        sum(tensor.output_bytes for tensor in plan.tensors.values())
        for plan in plans
        if plan.publication is not None
    )
    fixed = (
        FIXED_BYTES + WRITE_QUEUE_BYTES + KEPT_OUTPUT_BYTES + (sending_bytes(sent) if sent else 0)
    )
    room = budget - fixed - shared
    ahead = _read_ahead(plans, room, elsewhere=elsewhere)
    room -= ahead.bytes
    working, resident = {}, set()
    for name in plans[0].tensors:
        tensors = [plan.tensors[name] for plan in plans]
        working[name] = working_bytes(tensors, resident=True)
        if working[name] <= room:
            resident.add(name)
        else:
            working[name] = working_bytes(tensors, resident=False)
    worst, worst_name = max(((size, name) for name, size in working.items()), default=(0, ""))
    # A second of the largest pieces, so that the line need not wait while the first is merged.
    # Only of memory that was asked for.
    is_asked = plans[0].options.memory_budget is not None
    if is_asked and ahead.largest > ahead.window and room - ahead.largest >= worst:
        ahead = replace(ahead, window=ahead.window + ahead.largest)
        room -= ahead.largest
    return Fit(
        room=room,
        read_ahead_bytes=ahead.bytes,
        working=working,
        resident=frozenset(resident),
        worst=worst,
        worst_name=worst_name,
        needed_bytes=budget - room + worst,
    )


def fit_memory(plans: Sequence[Plan], found: Findings) -> list[Plan]:
    """Choose for every matrix how many float32 copies live at once; refuse what cannot fit.

    What may be in work at once (`working_bytes`) is bounded by the largest matrix, not by what the
    machine has, unless the user gave a budget. Processes on one machine share its budget.
    """
    first = plans[0]
    asked = first.options.memory_budget
    free = first.machine.memory_bytes if first.machine is not None else available_memory()
    sharing = machine_share()[1] if first.machine is None else 1
    budget = (asked if asked is not None else int(free * SHARE)) // sharing
    fitted = fit(plans, budget, elsewhere=first.machine is not None)
    room = fitted.room
    # Of each thread beyond two: row blocks of a matrix that it helps with, or of one to be written.
    helping = 2 * block_bytes(len(first.experts) + len(plans), BLOCK_ELEMENTS, 1)
    cores = usable_cores() if first.machine is None else 2
    threads = min(cores, 2 + max(room - fitted.worst, 0) // helping)
    room -= max(threads - 2, 0) * helping
    ample = 0  # in which two workers need not wait for each other, at the largest tensor
    for name in first.tensors:
        tensor = next((p.tensors[name] for p in plans if p.tensors[name].is_decomposed), None)
        if tensor is None:
            continue
        if tensor.is_factored or len(plans) > 1:
            ample = max(ample, 2 * fitted.working[name])
        else:
            ample = max(ample, 4 * (len(first.experts) + 2) * math.prod(tensor.matrix))
    working = max(fitted.worst, min(room, SPARE_BYTES + ample) if asked is None else room)
    if fitted.worst > room:
        needed = fitted.needed_bytes
        what = "merging" if len(plans) == 1 else f"comparing {len(plans)} methods on"
        which = "the memory budget" if asked is not None else "80 % of the free memory"
        each = "" if sharing == 1 else f" for each of the {sharing} processes here"
        found.problem(
            f"{what} {fitted.worst_name} needs {format_size(needed)} of memory, but {which} is "
            f"{format_size(budget)}{each}.",
            Remedy.MORE_MEMORY,
            *([Remedy.FEWER_PROCESSES] if each else []),
            kind=NotEnoughMemoryError.kind,
            needed=f"{-(-needed * sharing // 1_000_000)}MB",
        )
    return [
        replace(
            plan,
            tensors={
                name: replace(
                    one, resident=name in fitted.resident, working_bytes=fitted.working[name]
                )
                for name, one in plan.tensors.items()
            },
            memory_budget=budget,
            threads=threads,
            read_ahead_bytes=fitted.read_ahead_bytes,
            working_bytes=working,
            peak_memory_bytes=budget - room + working,
        )
        for plan in plans
    ]


def working_bytes(tensors: Sequence[PlannedTensor], *, resident: bool) -> int:
    """Return bytes of float32 memory that are held while a piece of a tensor is in work.

    Args:
        tensors: the same one, as each plan merges it. Plans that decompose it share task vectors.
        resident: whether task vectors of all experts are kept at once.
    """
    decomposed = [tensor for tensor in tensors if tensor.is_decomposed]
    if len(tensors) == 1 or not decomposed:
        return max(_alone_bytes(tensor, resident=resident) for tensor in tensors)
    (m, n), count = decomposed[0].matrix, len(decomposed[0].experts)
    scratch = sum(
        tensor.method.scratch_bytes(m, n, count) + _kept_bytes(tensor) for tensor in decomposed
    )
    block = block_bytes(count + len(tensors), m, n) + _made_bytes(decomposed[0])
    by_rows = [_alone_bytes(t, resident=resident) for t in tensors if not t.is_decomposed]
    return max(block + _copied_bytes(decomposed, resident=resident) + scratch, *by_rows, 0)


def _alone_bytes(tensor: PlannedTensor, *, resident: bool) -> int:
    (m, n), count = tensor.matrix, len(tensor.experts)
    if tensor.rule is None:
        return 0
    if tensor.factors is not None:
        return _factoring_bytes(tensor, resident=resident)
    block = block_bytes(count, m, n) + _made_bytes(tensor)
    output = m * n * DTYPES[tensor.spec.dtype].nbytes
    if tensor.is_quantised:
        # A band of blocks waits for its last rows: ΔW, W0, their sum, and each on its way to FP8.
        band = min(m * n, max(BLOCK_ELEMENTS, n) + FP8_BLOCK * n)
        block += 4 * 12 * band
        output = tensor.output_bytes
    if tensor.fused is not None and not tensor.fused.in_rows:
        output *= 1 + 2 * tensor.parts  # they wait for each other, and are woven
        if tensor.fused.turned:  # every model's matrix, as its own layer would store it
            stored = [source.tensors[tensor.spec.name] for source in tensor.read]
            output += m * n * sum(DTYPES[one.spec.dtype].nbytes for one in stored)
    if tensor.is_factored:
        return block + output + _factoring_bytes(tensor, resident=resident)
    if not tensor.rule.needs_matrix:
        held = PIECE_BYTES if tensor.rule.in_pieces else HELD_BYTES
        held = output if tensor.is_quantised else held
        return block + _kept_bytes(tensor) + (min(output, held) if tensor.is_held else 0)
    scratch = tensor.method.scratch_bytes(m, n, count) + _kept_bytes(tensor)
    return block + output + _copied_bytes([tensor], resident=resident) + scratch


def _kept_bytes(tensor: PlannedTensor) -> int:
    if tensor.rule is None:
        return 0
    return tensor.method.kept_bytes(tensor.spec, tensor.rule, len(tensor.experts))


def _copied_bytes(tensors: Sequence[PlannedTensor], *, resident: bool) -> int:
    """Return bytes of the float32 copies of task vectors that are shared."""
    at_once = max((tensor.rule.copies for tensor in tensors if tensor.rule is not None), default=0)
    return 4 * (len(tensors[0].experts) if resident else at_once) * math.prod(tensors[0].matrix)


def _factoring_bytes(tensor: PlannedTensor, *, resident: bool) -> int:
    """Return bytes that are held while a tensor's update becomes factors."""
    m, n = tensor.matrix if tensor.factors is None else tensor.spec.matrix_shape
    count = len(tensor.experts)
    # Factors as read, orthonormal, and twice as the update's: float64 but the first. Once more
    # for what the C library keeps of them for the next matrix.
    held = (m + n) * sum(rank or 0 for rank in tensor.ranks) * (4 + 8 + 2 * 8 + 8 + 8)
    if tensor.reads_layout and tensor.factors is not None:
        # The update whole, and its decomposition.
        held += block_bytes(count, m, n) + _made_bytes(tensor)
        held += 4 * m * n + solver_bytes(m, n, tensor.factors.rank, "auto")
        if tensor.is_decomposed:
            held += _copied_bytes([tensor], resident=resident)
            held += tensor.method.scratch_bytes(m, n, count)
    return held


def _made_bytes(tensor: PlannedTensor) -> int:
    """Return bytes of one piece that are made when it is read: dequantised, or put together."""
    rows = slice(tensor.rows_read)
    return sum(source.made_bytes(tensor.spec.name, rows) for source in tensor.read)


@dataclass(frozen=True, slots=True)
class _Ahead:
    """Private memory for what is read ahead: bytes of the largest piece, and of a window."""

    largest: int
    window: int

    @property
    def bytes(self) -> int:
        """Both together."""
        return self.largest + self.window


def _read_ahead(plans: Sequence[Plan], room: int, *, elsewhere: bool) -> _Ahead:
    """Return how much is read ahead.

    Pages of mapped files are not private; what comes from the Hub is, and what is made when it is
    read (dequantised, put together).
    """
    largest = 0
    for tensor in (tensor for plan in plans for tensor in plan.tensors.values()):
        rows = slice(tensor.rows_read)
        fetched = sum(
            source.read_cost(tensor.spec.name, rows)
            for source in tensor.read
            if source.is_remote or (elsewhere and source.folder is None)
        )
        largest = max(largest, fetched + _made_bytes(tensor))
    if not largest:
        return _Ahead(0, 0)
    window = min(HUB_WINDOW_BYTES, max(LEAST_HUB_WINDOW_BYTES, (room - largest) // 3))
    return _Ahead(largest, window)


def estimated(plan: Plan, *, has_folder: bool) -> Plan:
    """Say what the merge reads, how long it takes, and what it holds on the disk at most.

    Of one part of it: what that reads, and how long that takes.

    Args:
        plan: with all tensors and files.
        has_folder: whether it writes to a folder of the user's.
    """
    seconds, read, counting = _SECONDS_START, 0, plan.method.counting_passes()
    part, own = plan.options.part, None
    if part is not None:
        # Of arithmetic alone: what is known of the lines differs from machine to machine.
        each = [sum(_seconds(t, 1) for t in plan.written_in(shard)) for shard in plan.shards]
        numbers = shares(each, part.count) if part.count else [-1] * len(each)
        own = tuple(s.name for s, n in zip(plan.shards, numbers, strict=True) if n == part.number)
    merged = {
        tensor.spec.name
        for shard in plan.shards
        if own is None or shard.name in own
        for tensor in plan.written_in(shard)
    }
    for name, tensor in plan.tensors.items():
        passes = (counting if tensor.rule else 0) + (own is None or name in merged)
        read += passes * sum(source.read_cost(name) for source in tensor.read)
        seconds += _seconds(tensor, passes) if passes else 0.0
    sources = list(plan.checkpoints)
    share = sum(source.is_remote for source in sources) / len(sources)
    sent = plan.write_bytes if plan.publication is not None else 0
    disk = plan.unsent_bytes if plan.publication is not None else 0
    disk_bytes = read * (1 - share) + (plan.write_bytes if has_folder else 0)
    # Arithmetic, and what the disk reads and writes meanwhile.
    moving = disk_bytes / _DISK_RATE
    together = max(seconds, moving) + _APART * min(seconds - _SECONDS_START, moving)
    return replace(
        plan,
        own=own,
        read_bytes=read,
        compute_seconds=seconds,
        seconds_estimate=max(together, read * share / HUB_RATE, sent / HUB_RATE),
        peak_disk_bytes=plan.write_bytes if has_folder else disk,
    )


def _seconds(tensor: PlannedTensor, passes: int) -> float:
    """Return the time of one tensor: whole experts by its elements, factors by their ranks."""
    size, (rows, columns) = tensor.spec.numel, tensor.spec.matrix_shape
    if tensor.rule is None:
        return size * _SECONDS_ROWS
    ranks = tensor.ranks
    whole, rank = ranks.count(None), sum(rank or 0 for rank in ranks)
    # What is not decided from factors alone is made whole, theirs too.
    decomposed = 0 if tensor.is_factored else len(ranks)
    seconds = size * (whole + tensor.reads_layout) * _SECONDS_ROWS * passes
    if tensor.reads_layout:
        seconds += size * rank * _SECONDS_PRODUCT * passes
    if tensor.rule.needs_matrix:
        short = min(tensor.matrix)
        further = (tensor.method.directions(*tensor.matrix) - 1) * _SECONDS_DIRECTION
        each = _SECONDS_MATRIX + short * min(further, _SECONDS_SVD)
        if columns := tensor.method.columns(*tensor.matrix, len(ranks)):
            each = columns * _SECONDS_PRODUCT
        seconds += size * decomposed * each
    else:
        seconds += size * decomposed * tensor.method.entry_seconds()
    if tensor.factors is not None and tensor.reads_layout:
        seconds += size * _SECONDS_MATRIX  # the update whole, and its leading directions
    if not decomposed:
        seconds += (rows + columns) * rank**2 * _SECONDS_FACTORS
    return seconds
