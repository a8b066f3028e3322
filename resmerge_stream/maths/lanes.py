"""A device's lanes: stored bytes cross to it once, while other tensors are decided there.

Two tensors at a time. Four or eight, and results copied into pinned memory, changed nothing on an
H100: what a mean waits for there is the thread that takes the sha256.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .cores import Cores
from .task_vectors import Workspace


@dataclass(slots=True)
class Lane:
    """A way to merge a tensor on a device.

    Attributes:
        workspace: scratch memory there.
        whole: whether the stored bytes cross whole, once; else row block by row block, each time
            that a block is read, and float32 copies are kept of one expert at a time.
        remark: what the report says of a tensor that went this way, if anything.
    """

    workspace: Workspace
    whole: bool = True
    remark: str = ""
    _streams: threading.local = field(default_factory=threading.local)

    @contextmanager
    def taken(self) -> Iterator[None]:
        """Work on this thread's own stream, and end when all of it is done."""
        device = self.workspace.device
        if device.type != "cuda":
            yield
            return
        stream = getattr(self._streams, "stream", None)
        if stream is None:
            made = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            stream = self._streams.stream = made
        try:
            with torch.cuda.device(device), torch.cuda.stream(stream):
                yield
        finally:
            stream.synchronize()

    def cross(self, stored: Tensor) -> Tensor:
        """Return a tensor of stored bytes where it is to be worked with, in its stored dtype."""
        device = self.workspace.device
        if not self.whole or device.type != "cuda":
            return stored
        pinned = torch.empty_like(stored, pin_memory=True)
        return pinned.copy_(stored).to(device, non_blocking=True)

    def make_room(self) -> None:
        """Give back what is only kept for later."""
        self.workspace.drop()
        if self.workspace.device.type == "cuda":
            torch.cuda.empty_cache()


def lanes_of(device: torch.device, limit: int, cores: Cores) -> tuple[Lane, ...]:
    """Return the ways to try, one after the other, while there is not enough memory.

    Args:
        device: where the arithmetic happens.
        limit: bytes of scratch memory to keep for later.
        cores: that matrices in work share, on a CPU.
    """
    if device.type == "cpu":
        return (Lane(Workspace(device, limit, cores)),)
    return with_retreat(Lane(Workspace(device, limit)), limit)


def with_retreat(first: Lane, limit: int) -> tuple[Lane, ...]:
    """Return a device's lane, the one that needs less memory there, and the CPU's."""
    return (
        first,
        Lane(first.workspace, False, "the device's memory was short: merged in row blocks"),
        Lane(
            Workspace(torch.device("cpu"), limit),
            remark="the device's memory was short: merged on the CPU",
        ),
    )
