"""What this machine can give this process: device, free memory, free disk, threads."""

import contextlib
import ctypes
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import RecipeError, Remedy

if TYPE_CHECKING:
    import torch

_CGROUP = Path("/sys/fs/cgroup")
_UNLIMITED = 1 << 60
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8  # malloc.h
_ARENAS = 2
# What --device may say; whether there is such a device is for `choose_device` to find out.
DEVICE = re.compile(r"auto|cpu|mps|cuda(:\d{1,3})?")


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """What another machine has free, for a plan that is to run there.

    Attributes:
        memory_bytes: of memory.
        disk_bytes: of disk.
    """

    memory_bytes: int
    disk_bytes: int


def choose_device(name: str) -> "torch.device":
    """Return the torch device that an option names.

    Without a number, each process on this machine gets a GPU of its own.

    Args:
        name: ``auto`` (a GPU where there is one), ``cpu``, ``cuda``, ``cuda:N`` or ``mps``.

    Raises:
        RecipeError: no such device on this machine.
    """
    import torch

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "cpu" or (name == "auto" and not gpus):
        return torch.device("cpu")
    if name == "mps":
        raise RecipeError(
            "Apple's GPUs have no float64, which the sums need.", Remedy.ON_CPU, field="device"
        )
    torch.set_float32_matmul_precision("highest")  # no TF32: products keep float32's digits
    index = name.partition(":")[2]
    if int(index or 0) >= gpus:
        raise RecipeError(
            f"there is no {name}: this machine has {gpus} such device(s).",
            Remedy.ON_CPU,
            field="device",
        )
    return torch.device("cuda", int(index) if index else machine_share()[0] % gpus)


def machine_share() -> tuple[int, int]:
    """Return which process of a run this is on this machine, from 0, and of how many.

    accelerate and torchrun say so in the environment; alone it is 0 of 1.
    """
    number, count = (os.environ.get(key, "") for key in ("LOCAL_RANK", "LOCAL_WORLD_SIZE"))
    if not number.isdigit() or not count.isdigit():
        return 0, 1
    return int(number), max(int(count), 1)


def available_memory() -> int:
    """Return bytes of memory that may still be taken: the machine's or the container's."""
    return max(min(_machine_free(), _cgroup_free()), 0)


def _machine_free() -> int:
    try:
        return _kilobytes("/proc/meminfo")["MemAvailable"] * 1024
    except (OSError, KeyError, ValueError):
        import psutil  # not Linux; it takes as long to import as a plan does to make

        return int(psutil.virtual_memory().available)


def _kilobytes(path: str) -> dict[str, int]:
    """Return the fields of a file of /proc that are sizes."""
    with open(path, encoding="ascii", errors="replace") as lines:
        fields = (line.split(":", 1) for line in lines if line.endswith("kB\n"))
        return {key: int(value.split()[0]) for key, value in fields}


def private_memory() -> int:
    """Return bytes of this process's private memory now: anonymous and shared, no mapped files."""
    try:
        sizes = _kilobytes("/proc/self/status")
        return (sizes["RssAnon"] + sizes["RssShmem"]) * 1024
    except (OSError, KeyError, ValueError):
        import psutil  # not Linux

        return int(psutil.Process().memory_info().rss)


def keep_memory_steady(kept_bytes: int) -> None:
    """Have the C library keep freed buffers of up to a size, and give larger ones back.

    Only where it is glibc.

    By default it keeps freed buffers of up to 32 MB in the heap of the thread that freed them, 100
    to 150 MB more than is in use; and gives back a heap's end beyond 128 kB, whose pages are then
    zeroed anew for every block: 1.7 million faults in a merge by TIES instead of 0.3.
    """
    with contextlib.suppress(OSError, AttributeError):
        glibc = ctypes.CDLL(None)
        glibc.mallopt(_M_MMAP_THRESHOLD, kept_bytes)
        glibc.mallopt(_M_TRIM_THRESHOLD, 4 * kept_bytes)


def share_heaps() -> None:
    """Have all threads share two heaps of the C library, where it is glibc; before any is started.

    Of itself it makes eight for each core, and every heap keeps some of what was freed: TIES of two
    experts of 7B's widths took 312 to 403 MB so, and 310 to 317 with two, in the same time.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(_M_ARENA_MAX, _ARENAS)


def give_memory_back() -> None:
    """Have the C library return what it keeps for later buffers, where it is glibc."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def usable_cores() -> int:
    """Return how many cores this process may use: its share of what it and the container have."""
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    try:
        quota, period = (_CGROUP / "cpu.max").read_text(encoding="ascii").split()
        if quota != "max":
            cores = min(cores, -(-int(quota) // int(period)))
    except (OSError, ValueError):
        pass
    return max(cores // machine_share()[1], 1)


def free_disk(folder: Path) -> int:
    """Return free bytes on the disk of a folder, or of its nearest parent that exists."""
    folder = folder.absolute()
    while not os.path.exists(folder) and folder != folder.parent:
        folder = folder.parent
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return 0


def default_work_dir() -> Path:
    """Return the folder for journals: one folder a plan below it."""
    root = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(root) / "resmerge-stream"


def _cgroup_free() -> int:
    """Return what the container's memory limits leave, page cache counted as free.

    Every ancestor's limit holds: a service's slice as well as the container itself.
    """
    return min((_left(folder) for folder in _cgroup_folders()), default=_UNLIMITED)


def _cgroup_folders() -> list[Path]:
    """Return this process's control group and its ancestors (version 2), or version 1's root."""
    try:
        lines = Path("/proc/self/cgroup").read_text(encoding="ascii").splitlines()
    except (OSError, UnicodeDecodeError):
        lines = []
    own = next((line[3:] for line in lines if line.startswith("0::")), "/").strip("/")
    folder = _CGROUP / own
    folders = [folder, *(p for p in folder.parents if p.is_relative_to(_CGROUP))]
    return [*folders, _CGROUP / "memory"]


def _left(folder: Path) -> int:
    limit = _read_number(folder / "memory.max", folder / "memory.limit_in_bytes")
    used = _read_number(folder / "memory.current", folder / "memory.usage_in_bytes")
    if limit is None or used is None or limit >= _UNLIMITED:
        return _UNLIMITED
    return limit - max(used - _page_cache(folder / "memory.stat"), 0)


def _page_cache(path: Path) -> int:
    try:
        lines = path.read_text(encoding="ascii").splitlines()
    except (OSError, UnicodeDecodeError):
        return 0
    fields = dict(line.split(" ", 1) for line in lines if " " in line)
    value = fields.get("inactive_file", fields.get("total_inactive_file", "0"))
    return int(value) if value.isdigit() else 0


def _read_number(*paths: Path) -> int | None:
    for path in paths:
        try:
            text = path.read_text(encoding="ascii").strip()
        except (OSError, UnicodeDecodeError):
            continue
        return int(text) if text.isdigit() else None
    return None
