"""A checkpoint in another layout: other names, shapes or dtypes, made from what is stored.

Whoever reads a view sees a checkpoint. Tensors that are as stored are handed through; the others
are put together when they are read, in private memory that the plan counts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ..specs import TensorSpec
from .ahead import Ahead, Followed
from .assembly import Box, Reading, Source, Stored, whole
from .checkpoint import Checkpoint, SourceFile, StoredTensor
from .fetch import Span


class View:
    """Some trees of stored tensors, as a checkpoint. See `Checkpoint` for the attributes.

    Args:
        of: the checkpoint that is viewed.
        sources: every tensor of the view by name, in order.
        config: in place of the checkpoint's.
    """

    def __init__(
        self,
        of: Checkpoint,
        sources: Mapping[str, Source],
        *,
        config: dict[str, Any] | None = None,
    ) -> None:
        self.of = of
        self.sources = sources
        self.id, self.revision, self.folder = of.id, of.revision, of.folder
        self.subfolder = of.subfolder
        self.files: tuple[SourceFile, ...] = of.files
        self.config = of.config if config is None else config
        self.small_files, self.identity, self.license = of.small_files, of.identity, of.license
        self.gated, self.is_private, self.is_remote = of.gated, of.is_private, of.is_remote
        self.tensors: Mapping[str, StoredTensor] = {
            name: _stored_tensor(name, source) for name, source in sources.items()
        }

    @property
    def ahead(self) -> Ahead | None:
        """What reads ahead for the checkpoint that is viewed."""
        return self.of.ahead if isinstance(self.of, Followed) else None

    @ahead.setter
    def ahead(self, ahead: Ahead | None) -> None:
        if isinstance(self.of, Followed):
            self.of.ahead = ahead

    def read(self, name: str, start_row: int = 0, stop_row: int | None = None) -> memoryview:
        """Return some rows in the view's dtype: mapped bytes as stored, or made here and now."""
        source = self.sources[name]
        if isinstance(source, Stored):
            return source.checkpoint.read(source.name, start_row, stop_row)
        import numpy as np

        from .assembly import storage_type

        box = _rows(source, start_row, stop_row)
        out = np.empty([stop - start for start, stop in box], storage_type(source.dtype))
        source.fill(box, out)
        for reading in source.readings(box):
            # What was read is copied: its pages need not stay in memory.
            reading.checkpoint.release(reading.name, reading.start_row, reading.stop_row)
        return memoryview(out.reshape(-1).view(np.uint8))  # type: ignore[arg-type]  # as bytes_of

    def read_cost(self, name: str, start_row: int = 0, stop_row: int | None = None) -> int:
        """Return how many stored bytes are read for some rows."""
        return sum(
            reading.checkpoint.read_cost(reading.name, reading.start_row, reading.stop_row)
            for reading in self._readings(name, start_row, stop_row)
        )

    def made_bytes(self, name: str, start_row: int = 0, stop_row: int | None = None) -> int:
        """Return bytes of private memory that some rows take; 0 where they are as stored."""
        if isinstance(self.sources[name], Stored):
            return 0
        begin, end = self.tensors[name].byte_range(start_row, stop_row)
        return end - begin

    def release(self, name: str, start_row: int = 0, stop_row: int | None = None) -> None:
        """Let go of mapped pages; what was made here was let go when it was read."""
        source = self.sources[name]
        if isinstance(source, Stored):
            source.checkpoint.release(source.name, start_row, stop_row)

    def done_with(self, name: str, start_row: int = 0, stop_row: int | None = None) -> None:
        """Say that what these rows were made from was read for the last time."""
        for reading in self._readings(name, start_row, stop_row):
            reading.checkpoint.done_with(reading.name, reading.start_row, reading.stop_row)

    def spans(self, name: str, start_row: int = 0, stop_row: int | None = None) -> Iterator[Span]:
        """Yield what has to be fetched for some rows."""
        for reading in self._readings(name, start_row, stop_row):
            checkpoint = reading.checkpoint
            if isinstance(checkpoint, Followed):
                yield from checkpoint.spans(reading.name, reading.start_row, reading.stop_row)

    def read_small(self, name: str) -> bytes:
        """Return the content of one of `small_files`."""
        return self.of.read_small(name)

    def small_oid(self, name: str) -> str | None:
        """Return what git calls a small file's content, where that is known for free."""
        return self.of.small_oid(name)

    def close(self) -> None:
        """Release files and connections."""
        self.of.close()

    def stored_names(self, name: str) -> tuple[str, ...]:
        """Return the stored tensors that a tensor is made of."""
        return tuple(dict.fromkeys(reading.name for reading in self._readings(name, 0, None)))

    def _readings(self, name: str, start_row: int, stop_row: int | None) -> Iterator[Reading]:
        source = self.sources[name]
        yield from source.readings(_rows(source, start_row, stop_row))


def made_bytes(checkpoint: Checkpoint, name: str, start_row: int, stop_row: int | None) -> int:
    """Return bytes of private memory that rows of a checkpoint take; 0 where it is no view."""
    return checkpoint.made_bytes(name, start_row, stop_row) if isinstance(checkpoint, View) else 0


def source_of(checkpoint: Checkpoint, name: str) -> Source:
    """Return a tensor of a checkpoint as a tree, seen through views."""
    return checkpoint.sources[name] if isinstance(checkpoint, View) else Stored(checkpoint, name)


def _stored_tensor(name: str, source: Source) -> StoredTensor:
    first = next(iter(source.readings(whole(source.shape))))
    stored = first.checkpoint.tensors[first.name]
    if isinstance(source, Stored):
        if name == source.name:
            return stored
        return StoredTensor(TensorSpec(name, source.dtype, source.shape), stored.file, stored.begin)
    return StoredTensor(TensorSpec(name, source.dtype, source.shape), stored.file, 0)


def _rows(source: Source, start_row: int, stop_row: int | None) -> Box:
    if not source.shape:
        return ()
    stop = source.shape[0] if stop_row is None else stop_row
    return ((start_row, stop), *whole(source.shape[1:]))
