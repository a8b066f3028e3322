"""Stored bytes as tensors, tensors as stored bytes, and bytes gathered in one buffer."""

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


class Gathered:
    """Bytes put one after the other into memory that is taken at once.

    Many small parts kept among the temporaries of row blocks would keep a heap from shrinking:
    60 to 90 MB more, measured (docs/log.md).

    Args:
        nbytes: that will come.
    """

    def __init__(self, nbytes: int) -> None:
        self.data = bytes_of(torch.empty(nbytes, dtype=torch.uint8))
        self._done = 0

    def part(self, start: int, nbytes: int) -> memoryview:
        """Return the memory of some of them, to be written; they count as appended."""
        self._done = max(self._done, start + nbytes)
        return self.data[start : start + nbytes]

    def append(self, part: memoryview) -> None:
        """Copy the next bytes in."""
        self.data[self._done : self._done + len(part)] = part
        self._done += len(part)
