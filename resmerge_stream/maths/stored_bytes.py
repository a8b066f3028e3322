"""Stored bytes as tensors, tensors as stored bytes, and memory where bytes are gathered."""

import queue
import threading
import weakref

import numpy as np
import torch
from torch import Tensor

from ..specs import DTYPES


def as_tensor(buffer: memoryview, dtype: str, shape: tuple[int, ...]) -> Tensor:
    """Return stored bytes as a CPU tensor of their dtype, sharing the memory."""
    if len(buffer) == 0:
        return torch.empty(shape, dtype=getattr(torch, DTYPES[dtype].torch_name))
    return torch.frombuffer(buffer, dtype=getattr(torch, DTYPES[dtype].torch_name)).view(shape)


def bytes_of(tensor: Tensor) -> memoryview:
    """Return a tensor's bytes as they are stored, sharing the memory of one on the CPU."""
    flat = tensor.cpu().contiguous().flatten().view(torch.uint8)
    return memoryview(flat.numpy())  # type: ignore[arg-type]  # numpy's stubs lack Buffer on 3.11


class Recycled:
    """Memory that is lent again once nobody refers to it: the kernel hands out pages one by one,
    200,000 faults a GB, which took as long as a mean's arithmetic.

    Args:
        kept_bytes: that may wait to be lent again.
    """

    def __init__(self, kept_bytes: int) -> None:
        self._kept_bytes = kept_bytes
        self._lent_bytes = 0
        self._free: list[np.ndarray] = []
        # Memory comes back in whatever thread drops the last reference, in the middle of anything.
        self._returned: queue.SimpleQueue[tuple[int, np.ndarray | None]] = queue.SimpleQueue()
        self._lock = threading.Lock()

    def take(self, nbytes: int) -> memoryview:
        """Lend memory; contents undefined."""
        with self._lock:
            self._collect()
            fitting = [memory for memory in self._free if memory.nbytes == nbytes]
            memory = fitting[-1] if fitting else None
            self._free = [other for other in self._free if other is not memory]
            while sum(other.nbytes for other in self._free) > self._kept_bytes:
                del self._free[0]
            self._lent_bytes += nbytes
        if memory is None:
            memory = np.empty(nbytes, np.uint8)
        lent = memory.view()
        # What is too large to be kept goes with the last reference.
        again = memory if nbytes <= self._kept_bytes else None
        weakref.finalize(lent, self._returned.put, (nbytes, again)).atexit = False
        return memoryview(lent)  # type: ignore[arg-type]  # numpy's stubs lack Buffer on 3.11

    @property
    def lent_bytes(self) -> int:
        """Bytes that somebody still refers to."""
        with self._lock:
            self._collect()
            return self._lent_bytes

    def _collect(self) -> None:
        while not self._returned.empty():
            nbytes, memory = self._returned.get()
            self._lent_bytes -= nbytes
            if memory is not None:
                self._free.append(memory)


class Gathered:
    """Bytes put one after the other into memory that is taken at once.

    Many small parts kept among the temporaries of row blocks would keep a heap from shrinking:
    60 to 90 MB more, up to 700 in one run of ten on a busy machine.

    Args:
        nbytes: that will come.
        memory: where they are put.
    """

    def __init__(self, nbytes: int, memory: Recycled) -> None:
        self.data = memory.take(nbytes)
        self._done = 0

    def part(self, start: int, nbytes: int) -> memoryview:
        """Return the memory of some of them, to be written; they count as appended."""
        self._done = max(self._done, start + nbytes)
        return self.data[start : start + nbytes]

    def append(self, part: memoryview) -> None:
        """Copy the next bytes in."""
        self.data[self._done : self._done + len(part)] = part
        self._done += len(part)
