"""Which of the Hub's machines a plan fits, how long it takes there and what that costs."""

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

from ..device import Machine
from ..hub.flavors import FLAVORS, Flavor
from ..units import format_size
from .estimates import HUB_RATE
from .memory_fit import SHARE, fit
from .planned import Plan

# Seconds until a Job's merge begins: machine, image, packages. Assumed, never measured.
START_SECONDS, START_SECONDS_GPU = 120.0, 300.0


# The Hub ends a Job after 30 minutes unless it is told otherwise.
_LEAST_TIMEOUT, _TIMEOUT_STEP, _MARGIN = 1800, 600, 3.0


class Estimate(NamedTuple):
    """What work would take on a machine: does it fit, seconds with the start, dollars."""

    flavor: Flavor
    fits: bool
    seconds: float
    price: float


def estimates(plan: Plan, flavors: Iterable[Flavor] = FLAVORS) -> list[Estimate]:
    """Return what a plan would take on each machine, cheapest first, those that fit before others.

    Arithmetic is counted by cores, GPUs not at all: how much faster they are was not measured.

    Args:
        plan: of the merge.
        flavors: the machines.
    """
    return ranked(flavors, lambda it: merge_seconds(plan, it), lambda it: shortage(plan, it))


def ranked(
    flavors: Iterable[Flavor],
    seconds_on: Callable[[Flavor], float],
    lack_of: Callable[[Flavor], str],
) -> list[Estimate]:
    """Return what work would take on each machine, cheapest first, those that fit before others.

    Args:
        flavors: the machines.
        seconds_on: what it takes on one, once it has begun.
        lack_of: what one lacks for it, or an empty string.
    """
    found = []
    for flavor in flavors:
        start = START_SECONDS_GPU if flavor.gpu_gb else START_SECONDS
        seconds = start + seconds_on(flavor)
        found.append(Estimate(flavor, not lack_of(flavor), seconds, flavor.price(seconds)))
    return sorted(found, key=lambda e: (not e.fits, e.price, e.seconds, e.flavor.usd_hour))


def merge_seconds(plan: Plan, flavor: Flavor) -> float:
    """Return how long a merge would take on a machine, once it has begun."""
    arithmetic = plan.compute_seconds * 2 / flavor.vcpu
    return max(arithmetic, max(plan.read_bytes, plan.write_bytes) / HUB_RATE)


def shortage(plan: Plan, flavor: Flavor) -> str:
    """Return what a machine lacks for a plan, or an empty string."""
    machine, asked = flavor.machine, plan.options.memory_budget
    device = plan.options.device.partition(":")[0]
    if device == "mps" or (device == "cuda" and not flavor.gpu_gb):
        return f"it has no device of the kind {device}"
    budget = int(machine.memory_bytes * SHARE) if asked is None else asked
    needed = max(fit(plan, budget, elsewhere=True).needed_bytes, budget if asked is not None else 0)
    room = int(machine.memory_bytes * SHARE)
    if needed > min(budget, room):
        return (
            f"the merge needs {format_size(needed)} of memory, and {format_size(min(budget, room))}"
            f" of its {flavor.memory_gb:g} GB may be used"
        )
    if plan.unsent_bytes > machine.disk_bytes:
        return (
            f"{format_size(plan.unsent_bytes)} of shards wait on the disk, and of its "
            f"{flavor.disk_gb:g} GB {format_size(machine.disk_bytes)} are left beside the packages"
        )
    return ""


def largest(flavors: Iterable[Flavor] = FLAVORS) -> Machine:
    """Return a machine with the most memory and the most disk of all."""
    machines = [flavor.machine for flavor in flavors]
    return Machine(
        memory_bytes=max(machine.memory_bytes for machine in machines),
        disk_bytes=max(machine.disk_bytes for machine in machines),
    )


def timeout_for(seconds: float) -> int:
    """Return after how many seconds a Job is ended: three times the estimate, 30 minutes at least.

    In whole ten minutes.
    """
    wanted = max(seconds * _MARGIN, _LEAST_TIMEOUT)
    return math.ceil(wanted / _TIMEOUT_STEP) * _TIMEOUT_STEP
