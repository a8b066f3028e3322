"""Which of the Hub's machines a plan fits, how long it takes there and what that costs."""

import math
from collections.abc import Callable, Iterable
from itertools import pairwise
from typing import NamedTuple

from ..device import Machine
from ..hub.flavors import FLAVORS, Flavor
from ..units import format_size
from .costs import HUB_RATE, SHARE, fit
from .planned import Plan

# Seconds until a Job's merge begins: machine, image, packages. Assumed, never measured.
START_SECONDS, START_SECONDS_GPU = 120.0, 300.0
# Seconds in which one machine commits a shard, while no other one may. Assumed.
COMMIT_SECONDS = 1.0
# How many machines are compared, and what twice as many must gain to be worth their starts.
FLEETS = (1, 2, 4, 8, 16)
_WORTH = 1.5


# The Hub ends a Job after 30 minutes unless it is told otherwise.
_LEAST_TIMEOUT, _TIMEOUT_STEP, _MARGIN = 1800, 600, 3.0


class Speed(NamedTuple):
    """How fast one of the Hub's machines is.

    Attributes:
        start_s: until work begins: machine, image, packages.
        line: bytes a second from the Hub, and at the same time to it.
        arithmetic: seconds for each that arithmetic is estimated at.
        runs: how many Jobs this was measured on; 0: assumed.
        days: since the last of them.
    """

    start_s: float
    line: float = HUB_RATE
    arithmetic: float = 1.0
    runs: int = 0
    days: int = 0


def assumed(flavor: Flavor) -> Speed:
    """Return how fast a machine is taken to be on which nothing was measured."""
    return Speed(START_SECONDS_GPU if flavor.gpu_gb else START_SECONDS)


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
    return ranked(
        flavors,
        lambda it, speed: merge_work(plan, it).seconds(speed),
        lambda it: shortage(plan, it),
    )


def ranked(
    flavors: Iterable[Flavor],
    seconds_on: Callable[[Flavor, Speed], float],
    lack_of: Callable[[Flavor], str],
    speed_of: Callable[[Flavor], Speed] = assumed,
) -> list[Estimate]:
    """Return what work would take on each machine, cheapest first, those that fit before others.

    Args:
        flavors: the machines.
        seconds_on: what it takes on one, once it has begun.
        lack_of: what one lacks for it, or an empty string.
        speed_of: how fast one is.
    """
    found = []
    for flavor in flavors:
        speed = speed_of(flavor)
        seconds = speed.start_s + seconds_on(flavor, speed)
        found.append(Estimate(flavor, not lack_of(flavor), seconds, flavor.price(seconds)))
    return sorted(found, key=lambda e: (not e.fits, e.price, e.seconds, e.flavor.usd_hour))


class Work(NamedTuple):
    """What a merge has to do on a machine, the two at the same time.

    Attributes:
        moved_bytes: over the line, in the direction in which more go.
        arithmetic_s: estimated, from seconds on two cores.
    """

    moved_bytes: int
    arithmetic_s: float

    def seconds(self, speed: Speed) -> float:
        """Return how long it takes at a speed, once it has begun."""
        return max(self.arithmetic_s * speed.arithmetic, self.moved_bytes / speed.line)


def merge_work(plan: Plan, flavor: Flavor) -> Work:
    """Return what a merge has to do on a machine."""
    return Work(max(plan.read_bytes, plan.write_bytes), plan.compute_seconds * 2 / flavor.vcpu)


class Fleet(NamedTuple):
    """What a merge would take on several machines, each with a line of its own.

    Attributes:
        machines: how many.
        seconds: with the start.
        price: of all, in dollars.
        limit: what they wait for: ``line``, ``arithmetic``, ``commits`` (one after another),
            ``whole shards`` (a shard is merged by one machine) or ``start``.
    """

    machines: int
    seconds: float
    price: float
    limit: str


def fleet(plan: Plan, flavor: Flavor, speed: Speed, machines: int) -> Fleet:
    """Return what a merge would take on so many machines of a kind."""
    work = merge_work(plan, flavor)
    limits = {
        "arithmetic": work.arithmetic_s * speed.arithmetic / machines,
        "line": work.moved_bytes / speed.line / machines,
    }
    shards, most = len(plan.shards), work.seconds(speed)
    limits["whole shards"] = most * -(-shards // machines) / shards
    if machines > 1:
        limits["commits"] = shards * COMMIT_SECONDS
    merging = max(limits.values())
    limits["start"] = speed.start_s
    # Rounding up to whole shards is named where it is more than a tenth.
    if limits["whole shards"] <= 1.1 * most / machines:
        del limits["whole shards"]
    seconds = speed.start_s + merging
    limit = max(limits, key=limits.__getitem__)
    return Fleet(machines, seconds, machines * flavor.price(seconds), limit)


def worthwhile(found: Iterable[Fleet]) -> Fleet:
    """Return the largest of fleets up to which each doubling saves a third of the time."""
    rows = list(found)
    best = rows[0]
    for smaller, larger in pairwise(rows):
        if smaller.seconds < _WORTH * larger.seconds:
            break
        best = larger
    return best


def shortage(plan: Plan, flavor: Flavor) -> str:
    """Return what a machine lacks for a plan, or an empty string."""
    machine, asked = flavor.machine, plan.options.memory_budget
    device = plan.options.device.partition(":")[0]
    if device == "mps" or (device == "cuda" and not flavor.gpu_gb):
        return f"it has no device of the kind {device}"
    budget = int(machine.memory_bytes * SHARE) if asked is None else asked
    needed = max(
        fit([plan], budget, elsewhere=True).needed_bytes, budget if asked is not None else 0
    )
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
