"""One kind of model: facts about it, the store of its bytes, and how its tensors are made of them.

A model in another layout (other names, shapes or dtypes) is the same model with other trees. What
is as stored is handed through; the rest is put together when it is read, in private memory that the
plan counts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from ..maths.lazy import np
from ..specs import TensorSpec
from .ahead import ByteRange
from .assembly import Box, Reading, Source, Stored, storage_type, whole
from .store import ALL, SourceFile, Store, StoredTensor


@dataclass(frozen=True, kw_only=True, eq=False)
class Checkpoint:
    """A model's headers and configs, read; and its weights, to be read in ranges.

    Attributes:
        id: how the user named it.
        store: where its bytes are.
        trees: how each tensor is made of stored ones, in the order of the files and of their bytes.
        config: the parsed ``config.json``.
        files: the weight files.
        identity: what tells this checkpoint from another under the same name; JSON-able.
        small_files: names of the other files that a model is loaded with.
        remarks: what a user should know of how its files differ from one another.
        revision: the commit hash that everything is read from, or None for a folder.
        subfolder: of the repository, where it does not lie at the top.
        folder: where it lies on this machine, or None.
        license: licence id, where the checkpoint says one.
        gated: whether access must be asked for.
        is_private: whether its name may appear in a public card.
        is_remote: whether reading weights needs the network, so that they are read ahead.
        seen: the model as it was opened, where this is another layout of it.
    """

    id: str
    store: Store
    trees: Mapping[str, Source]
    config: dict[str, Any]
    files: tuple[SourceFile, ...]
    identity: dict[str, Any]
    small_files: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()
    revision: str | None = None
    subfolder: str | None = None
    folder: str | None = None
    license: str | None = None
    gated: bool = False
    is_private: bool = True
    is_remote: bool = False
    seen: Checkpoint | None = None

    @property
    def opened(self) -> Checkpoint:
        """The model as it was opened."""
        return self.seen or self

    @cached_property
    def tensors(self) -> Mapping[str, StoredTensor]:
        """Every tensor by name, as it is read, with the file of its first bytes."""
        return {name: _stored_tensor(name, tree) for name, tree in self.trees.items()}

    def with_trees(
        self, trees: Mapping[str, Source], *, config: dict[str, Any] | None = None
    ) -> Checkpoint:
        """Return the model in another layout.

        Args:
            trees: every tensor by name, in order.
            config: in place of the model's.
        """
        config = self.config if config is None else config
        return replace(self, trees=trees, config=config, seen=self.opened)

    def readings(self, name: str, rows: slice = ALL) -> Iterator[Reading]:
        """Yield which stored rows are read for some rows (first axis)."""
        tree = self.trees[name]
        return tree.readings(_box(tree, rows))

    def read(self, name: str, rows: slice = ALL) -> memoryview:
        """Return the bytes of a tensor, or of some of its rows (first axis).

        Raises:
            StoppedError: the bytes cannot be had right now; a later run may continue.
            CheckpointFormatError: the file changed or is cut short.
        """
        tree = self.trees[name]
        if isinstance(tree, Stored):
            return tree.store.read(tree.tensor.file, *tree.tensor.byte_range(rows))
        box = _box(tree, rows)
        out = np.empty([stop - start for start, stop in box], storage_type(tree.dtype))
        tree.fill(box, out)
        for reading in tree.readings(box):
            # What was read is copied: its pages need not stay in memory.
            reading.store.release(*reading.place)
        return memoryview(out.reshape(-1).view(np.uint8))  # type: ignore[arg-type]  # as bytes_of

    def read_cost(self, name: str, rows: slice = ALL) -> int:
        """Return how many stored bytes are read for some rows."""
        return sum(end - begin for _, begin, end in (r.place for r in self.readings(name, rows)))

    def made_bytes(self, name: str, rows: slice = ALL) -> int:
        """Return bytes of private memory that some rows take; 0 where they are as stored."""
        if isinstance(self.trees[name], Stored):
            return 0
        begin, end = self.tensors[name].byte_range(rows)
        return end - begin

    def rank_of(self, name: str) -> int | None:
        """Return the rank of a tensor's update at most; None where it is not given by factors."""
        return None

    def spans(self, name: str, rows: slice = ALL) -> Iterator[ByteRange]:
        """Yield what has to be fetched for some rows."""
        for reading in self.readings(name, rows):
            if (span := reading.store.span(*reading.place)) is not None:
                yield span

    def release(self, name: str, rows: slice = ALL) -> None:
        """Hint that these rows were read and may leave the memory; reading them again is fine."""
        tree = self.trees[name]
        if isinstance(tree, Stored):  # what was made of others let them go when it was read
            tree.store.release(tree.tensor.file, *tree.tensor.byte_range(rows))

    def done_with(self, name: str, rows: slice = ALL) -> None:
        """Say that these rows were read for the last time in this run, and that it went well.

        Raises:
            SourceChangedError: the file changed, so that they may not be used.
            CheckpointNotFoundError: it is gone.
            StoppedError: its disk failed.
        """
        for reading in self.readings(name, rows):
            reading.store.done_with(*reading.place)

    def check(self) -> None:
        """See that all weight files are those whose headers were read; raises as `done_with`."""
        self.store.check()

    def read_small(self, name: str) -> bytes:
        """Return the content of one of `small_files`."""
        return self.store.read_small(name)

    def small_oid(self, name: str) -> str | None:
        """Return what git calls a small file's content where that is known for free, else None."""
        return self.store.small_oid(name)

    def close(self) -> None:
        """Release files and connections; reading afterwards is an error."""
        self.store.close()


def same_values(checkpoint: Checkpoint, left: str, right: str) -> bool:
    """Return whether two tensors of a checkpoint are one: dtype, shape and bytes.

    Over the network, some rows stand for all.
    """
    a, b = checkpoint.tensors[left].spec, checkpoint.tensors[right].spec
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    rows, step = a.matrix_shape[0], 4096
    starts = range(0, rows, step)
    if checkpoint.is_remote:
        # A few rows from all over the table: reading both whole would take longer than a plan may.
        step = 32
        starts = range(0, rows, max(rows // 8, 1))
    blocks = [slice(start, start + step) for start in starts]
    return all(checkpoint.read(left, own) == checkpoint.read(right, own) for own in blocks)


def _stored_tensor(name: str, tree: Source) -> StoredTensor:
    if isinstance(tree, Stored) and tree.name == name:
        return tree.tensor
    first = next(iter(tree.readings(whole(tree.shape)))).tensor
    begin = first.begin if isinstance(tree, Stored) else 0
    return StoredTensor(TensorSpec(name, tree.dtype, tree.shape), first.file, begin)


def _box(tree: Source, rows: slice) -> Box:
    if not tree.shape:
        return ()
    start, stop, _ = rows.indices(tree.shape[0])
    return ((start, stop), *whole(tree.shape[1:]))
