"""Shards that become tensors in memory instead of files."""

from collections.abc import Callable
from pathlib import Path

import numpy
import torch
from torch import Tensor

from ..specs import DTYPES, TensorSpec
from .layout import Shard
from .sink import DroppingSink, ShardWriter


class TensorSink(DroppingSink):
    """Hands every tensor over once it is whole; its report goes where a `DroppingSink`'s does.

    Args:
        take: given name and values of each, which are nobody else's.
        path: of the report; None keeps none.
    """

    def __init__(self, take: Callable[[str, Tensor], None], path: Path | None = None) -> None:
        super().__init__(path)
        self._take = take

    def open_shard(self, shard: Shard) -> ShardWriter:
        """Return a writer that cuts the bytes into tensors."""
        return _Tensors(shard, self._take)


class _Tensors:
    """One shard, front to back. See `ShardWriter`."""

    def __init__(self, shard: Shard, take: Callable[[str, Tensor], None]) -> None:
        self._specs, self._take = list(reversed(shard.tensors)), take
        self._buffer, self._filled = torch.empty(0, dtype=torch.uint8), 0
        self._start()

    def write(self, data: memoryview) -> None:
        """Fill tensor after tensor."""
        while len(data):
            size = min(len(data), len(self._buffer) - self._filled)
            room = self._buffer[self._filled : self._filled + size].numpy()
            room[:] = numpy.frombuffer(data[:size], dtype=numpy.uint8)
            self._filled, data = self._filled + size, data[size:]
            if self._filled == len(self._buffer):
                self._hand_over(self._specs.pop())
                self._start()

    def finish(self) -> str:
        """Return an empty hash: nothing was written.

        Raises:
            RuntimeError: bytes are missing.
        """
        if self._specs:
            raise RuntimeError(f"{self._specs[-1].name} is not whole")
        return ""

    def abort(self) -> None:
        """Do nothing."""

    def _start(self) -> None:
        """Make room for the next tensor; one without elements is whole at once."""
        while self._specs and not self._specs[-1].nbytes:
            self._buffer = torch.empty(0, dtype=torch.uint8)
            self._hand_over(self._specs.pop())
        size = self._specs[-1].nbytes if self._specs else 0
        self._buffer, self._filled = torch.empty(size, dtype=torch.uint8), 0

    def _hand_over(self, spec: TensorSpec) -> None:
        dtype = getattr(torch, DTYPES[spec.dtype].torch_name)
        self._take(spec.name, self._buffer.view(dtype).reshape(spec.shape))
