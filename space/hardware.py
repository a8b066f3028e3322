"""What other hardware would take for a plan, from a plain model that is said beside the numbers."""

from dataclasses import dataclass

# Bytes a second from and to the Hub, at the same time: a modest line, as the plan assumes.
_HUB_RATE = 50e6
# The cores that the plan's seconds were measured on (docs/performance.md).
_MEASURED_CORES = 2
# The arithmetic runs in threads; more than this share of the cores is never assumed to help.
_MOST_CORES = 8
# A process with Python and torch, beside the merge itself.
_OVERHEAD = 600_000_000

MODEL = (
    "The longer of arithmetic and transfer. Arithmetic: as measured on two cores, faster in "
    "proportion up to eight; with a GPU it is taken to be hidden behind the transfer, which was "
    "not measured. Transfer: 50 MB/s each way, at the same time."
)


@dataclass(frozen=True, slots=True)
class Machine:
    """Hardware for a merge.

    Attributes:
        name: as the Hub calls it.
        cores: of the CPU.
        memory, disk: bytes.
        price: dollars an hour; 0 is free, None is not for rent.
        gpu: what it is called, or empty.
    """

    name: str
    cores: int
    memory: int
    disk: int
    price: float | None
    gpu: str


@dataclass(frozen=True, slots=True)
class Fit:
    """What a plan means on a machine.

    Attributes:
        machine: which.
        seconds: estimated.
        lacks: ``memory`` or ``disk``, where there is not enough.
    """

    machine: Machine
    seconds: float
    lacks: tuple[str, ...]

    @property
    def cost(self) -> float | None:
        """Dollars for the time, or None where it cannot be rented."""
        price = self.machine.price
        return None if price is None else price * self.seconds / 3600


_GB = 1_000_000_000
# The Hub's documentation of August 2026; sizes are what a Space sees.
MACHINES = (
    Machine("cpu-basic", 2, 16 * _GB, 50 * _GB, 0.0, ""),
    Machine("cpu-upgrade", 8, 32 * _GB, 50 * _GB, 0.03, ""),
    Machine("t4-small", 4, 15 * _GB, 50 * _GB, 0.40, "T4"),
    Machine("l4x1", 8, 30 * _GB, 400 * _GB, 0.80, "L4"),
    Machine("a10g-small", 4, 15 * _GB, 110 * _GB, 1.00, "A10G"),
    Machine("a10g-large", 12, 46 * _GB, 200 * _GB, 1.50, "A10G"),
    Machine("l40sx1", 8, 62 * _GB, 380 * _GB, 1.80, "L40S"),
    Machine("a100-large", 12, 142 * _GB, 1000 * _GB, 2.50, "A100"),
)


def fits(
    here: Machine, *, compute_seconds: float, received: int, sent: int, memory: int, disk: int
) -> list[Fit]:
    """Return what a plan means on this machine and on each that the Hub rents out.

    Args:
        here: this machine.
        compute_seconds: of the arithmetic, on two cores.
        received, sent: bytes over the network.
        memory, disk: bytes that the plan takes at most.
    """
    transfer = max(received, sent) / _HUB_RATE

    def fit(machine: Machine) -> Fit:
        speed = min(machine.cores, _MOST_CORES) / _MEASURED_CORES
        compute = 0.0 if machine.gpu else compute_seconds / speed
        lacks = []
        if memory + _OVERHEAD > machine.memory:
            lacks.append("memory")
        if disk > machine.disk:
            lacks.append("disk")
        return Fit(machine, max(compute, transfer, 3.0), tuple(lacks))

    return [fit(machine) for machine in (here, *MACHINES)]
