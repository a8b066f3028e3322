"""What a plan takes here and on the Hub's machines, from the library's table and model."""

from dataclasses import dataclass

from resmerge_stream.hub.flavors import FLAVORS
from resmerge_stream.planning.machines import estimates, shortage
from resmerge_stream.planning.plan import Plan

# Those that a Space is often given; the Jobs have larger ones.
SHOWN = (
    "cpu-basic", "cpu-upgrade", "t4-small", "l4x1", "a10g-small", "a10g-large", "l40sx1",
    "a100-large",
)  # fmt: skip
MODEL = (
    "Time: the start of the machine, and the longer of arithmetic and transfer. Arithmetic as "
    "measured on two cores, in proportion to the cores; the Hub's GPUs were not measured "
    "and are not counted. Transfer at 50 MB/s each way, at the same time."
)


@dataclass(frozen=True, slots=True)
class Hardware:
    """A machine, and what a plan means there.

    Attributes:
        name: as the Hub calls it.
        cores: how many.
        memory, disk: bytes.
        seconds: estimated, with the start.
        cost: dollars for that time; None for a machine that is not for rent.
        lacks: why the plan does not fit, or empty.
    """

    name: str
    cores: int
    memory: int
    disk: int
    seconds: float
    cost: float | None = None
    lacks: str = ""


def hardware_for(plan: Plan, *, cores: int, memory: int, disk: int) -> list[Hardware]:
    """Return what a plan that was not refused takes here, and on the machines of `SHOWN`.

    Args:
        plan: the plan.
        cores: that are here.
        memory, disk: bytes that are free here.
    """
    found = [Hardware("this machine", cores, memory, disk, plan.seconds_estimate)]
    chosen = {flavor.name: flavor for flavor in FLAVORS if flavor.name in SHOWN}
    known = {item.flavor.name: item for item in estimates(plan, chosen.values())}
    for name in SHOWN:
        flavor, estimate = chosen[name], known[name]
        has = (flavor.vcpu, int(flavor.memory_gb * 1e9), int(flavor.disk_gb * 1e9))
        lacks = "" if estimate.fits else shortage(plan, flavor)
        found.append(Hardware(name, *has, estimate.seconds, estimate.price, lacks))
    return found
