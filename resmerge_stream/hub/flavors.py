"""What the Hub's machines are and cost, and which of them a plan fits. No torch, no network."""

import math
import re
from dataclasses import dataclass

from ..device import Machine
from ..units import parse_size

# Bytes that the installed packages take on the disk; torch with CUDA is most of the second.
INSTALLED_BYTES, INSTALLED_BYTES_GPU = 3_000_000_000, 12_000_000_000
_GB = 1_000_000_000
_AMOUNT = re.compile(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)")


@dataclass(frozen=True, slots=True)
class Flavor:
    """One of the Hub's machines.

    Attributes:
        name: as ``--flavor`` takes it.
        vcpu: cores.
        memory_gb, disk_gb, gpu_gb: in 10^9 bytes; no GPU: 0.
        usd_hour: price of an hour, billed by the minute.
        gpus: how many share `gpu_gb`, each the same.
    """

    name: str
    vcpu: int
    memory_gb: float
    disk_gb: float
    gpu_gb: float
    usd_hour: float
    gpus: int = 1

    @property
    def machine(self) -> Machine:
        """What it has for a plan."""
        taken = INSTALLED_BYTES_GPU if self.gpu_gb else INSTALLED_BYTES
        return Machine(
            memory_bytes=int(self.memory_gb * _GB),
            disk_bytes=max(int(self.disk_gb * _GB) - taken, 0),
        )

    def price(self, seconds: float) -> float:
        """Return dollars for so many seconds; a started minute is a minute."""
        return math.ceil(seconds / 60) / 60 * self.usd_hour


# huggingface/hub-docs, docs/hub/jobs-pricing.md at commit 0b8c07f, read 2026-11-22. The Hub's own
# list is asked first where there is a network. Spaces have the same machines.
FLAVORS = (
    Flavor("cpu-basic", 2, 16, 50, 0, 0.01),
    Flavor("cpu-upgrade", 8, 32, 50, 0, 0.03),
    Flavor("cpu-xl", 16, 124, 1000, 0, 1.00),
    Flavor("cpu-performance", 32, 256, 1024, 0, 1.90),
    Flavor("t4-small", 4, 15, 50, 16, 0.40),
    Flavor("t4-medium", 8, 30, 100, 16, 0.60),
    Flavor("l4x1", 8, 30, 400, 24, 0.80),
    Flavor("l4x4", 48, 186, 3200, 96, 3.80, 4),
    Flavor("l40sx1", 8, 62, 380, 48, 1.80),
    Flavor("l40sx4", 48, 382, 3200, 192, 8.30, 4),
    Flavor("l40sx8", 192, 1534, 6500, 384, 23.50, 8),
    Flavor("a10g-small", 4, 15, 110, 24, 1.00),
    Flavor("a10g-large", 12, 46, 200, 24, 1.50),
    Flavor("a10g-largex2", 24, 92, 1000, 48, 3.00, 2),
    Flavor("a10g-largex4", 48, 184, 2000, 96, 5.00, 4),
    Flavor("a100-large", 12, 142, 1000, 80, 2.50),
    Flavor("a100x4", 48, 568, 4000, 320, 10.00, 4),
    Flavor("a100x8", 96, 1136, 8000, 640, 20.00, 8),
    Flavor("h200", 23, 256, 3000, 141, 5.00),
    Flavor("h200x2", 46, 512, 6000, 282, 10.00, 2),
    Flavor("h200x4", 92, 1024, 12000, 564, 20.00, 4),
    Flavor("h200x8", 184, 2048, 24000, 1128, 40.00, 8),
    Flavor("rtx-pro-6000", 23, 256, 475, 96, 2.75),
    Flavor("rtx-pro-6000x2", 46, 512, 950, 192, 5.50, 2),
    Flavor("rtx-pro-6000x4", 92, 1024, 1900, 384, 11.00, 4),
    Flavor("rtx-pro-6000x8", 184, 2048, 3800, 768, 22.00, 8),
)


def flavor_from_text(
    name: str, *, cpu: str, ram: str, disk: str, gpu: str, usd: float, unit: str, gpus: str = "1"
) -> Flavor | None:
    """Return the machine that the Hub's list describes in words, None where they are not known.

    Args:
        name: of the flavour.
        cpu, ram, disk, gpu: such as ``2 vCPU``, ``16 GB``, ``50 GB``; no GPU: an empty string.
        usd: the price of a unit of time.
        unit: ``minute`` or ``hour``.
        gpus: how many there are.
    """
    units = {"minute": 60.0, "hour": 1.0}
    cores = _AMOUNT.match(cpu)
    sizes = [_gigabytes(text) for text in (ram, disk, gpu or "0")]
    if cores is None or unit not in units or None in sizes or not 0 <= usd < 1e4:
        return None
    if not gpus.isdecimal() or int(gpus) < 1:
        return None
    memory_gb, disk_gb, gpu_gb = (size or 0.0 for size in sizes)
    vcpu, usd_hour = int(float(cores[1])), usd * units[unit]
    return Flavor(name, vcpu, memory_gb, disk_gb, gpu_gb, usd_hour, int(gpus))


def _gigabytes(text: str) -> float | None:
    amount = _AMOUNT.fullmatch(text.strip())
    if amount is None or amount[2].upper() not in ("", "MB", "GB", "TB", "GIB", "TIB", "MIB"):
        return None
    return parse_size(text) / _GB
