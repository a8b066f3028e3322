"""What a merge reads, and how long it takes about: from shapes and ranks. No torch."""

from dataclasses import replace

from ..sources.adapter import rank_of
from .planned import Plan, PlannedTensor

# Seconds on two cores, measured (docs/performance.md): an element and model read; an element and
# whole expert whose leading direction is found; beside it, and for each row of the shorter side,
# every further direction, or all of them; an element and rank of B·A; of factors, a row or column
# and rank squared.
_SECONDS_START = 3.0
_SECONDS_ROWS = 0.6e-9
_SECONDS_MATRIX = 4.0e-9
_SECONDS_DIRECTION = 9.0e-13
_SECONDS_SVD = 1.5e-10
_SECONDS_PRODUCT = 4.0e-11
_SECONDS_FACTORS = 3.0e-10
# Bytes a second from and to the Hub: a modest line; the two go on at the same time.
HUB_RATE = 50e6


def estimated(plan: Plan, *, has_folder: bool) -> Plan:
    """Say what the merge reads, how long it takes, and what it holds on the disk at most.

    Args:
        plan: with all tensors and files.
        has_folder: whether it writes to a folder of the user's.
    """
    seconds, read = _SECONDS_START, 0
    passes = 1 + plan.method.counting_passes()
    for name, tensor in plan.tensors.items():
        stored = sum(source.read_cost(name) for source in plan.read_for(tensor))
        read += stored * (passes if tensor.rule else 1)
        seconds += _seconds(plan, tensor, passes)
    sources = list(plan.checkpoints)
    share = sum(source.is_remote for source in sources) / len(sources)
    sent = plan.write_bytes if plan.publication is not None else 0
    disk = plan.unsent_bytes if plan.publication is not None else 0
    return replace(
        plan,
        read_bytes=read,
        compute_seconds=seconds,
        seconds_estimate=max(seconds, read * share / HUB_RATE, sent / HUB_RATE),
        peak_disk_bytes=plan.write_bytes if has_folder else disk,
    )


def _seconds(plan: Plan, tensor: PlannedTensor, passes: int) -> float:
    """Return the time of one tensor: whole experts by its elements, factors by their ranks."""
    size, (rows, columns) = tensor.spec.numel, tensor.spec.matrix_shape
    if tensor.rule is None:
        return size * _SECONDS_ROWS
    ranks = [rank_of(plan.experts[number], tensor.spec.name) for number in tensor.experts]
    whole, rank = ranks.count(None), sum(rank or 0 for rank in ranks)
    # What is not decided from factors alone is made whole, theirs too.
    decomposed = 0 if plan.is_factored(tensor) else len(ranks)
    seconds = size * (whole + tensor.reads_layout) * _SECONDS_ROWS * passes
    if tensor.reads_layout:
        seconds += size * rank * _SECONDS_PRODUCT * passes
    if tensor.rule.needs_matrix:
        short = min(tensor.matrix)
        further = (tensor.method.directions(*tensor.matrix) - 1) * _SECONDS_DIRECTION
        each = _SECONDS_MATRIX + short * min(further, _SECONDS_SVD)
        seconds += size * decomposed * each
    if tensor.factors is not None and tensor.reads_layout:
        seconds += size * _SECONDS_MATRIX  # the update whole, and its leading directions
    if not decomposed:
        seconds += (rows + columns) * rank**2 * _SECONDS_FACTORS
    return seconds
