"""Whether files came as the Hub names them: hashed while they stream, compared at the end."""

import hashlib
from collections.abc import Iterator
from typing import Protocol, runtime_checkable

from .checkpoint import Checkpoint


class FileCheck:
    """The sha256 of one file that is read in order; what is read out of order is left aside.

    Args:
        head: the file's first bytes, which were read while planning.
        size: bytes of the whole file.
        sha256: in hex, as the Hub names it.
    """

    def __init__(self, head: bytes, size: int, sha256: str) -> None:
        self._size, self._sha256 = size, sha256
        self._first = len(head)
        self._head = hashlib.sha256(head)
        self._position, self._hash = self._first, self._head.copy()

    def take(self, begin: int, view: memoryview) -> bool:
        """Take bytes that were read; return whether the file is whole now, and another.

        Args:
            begin: their place in the file. The first byte after the head starts afresh.
            view: the bytes.
        """
        if begin == self._first and self._position != begin:
            self._position, self._hash = self._first, self._head.copy()
        if begin != self._position:
            return False
        self._hash.update(view)
        self._position += len(view)
        return self._position == self._size and self._hash.hexdigest() != self._sha256


@runtime_checkable
class Checked(Protocol):
    """A checkpoint whose files have a sha256 to be compared with.

    Attributes:
        checks: whether what is read is hashed.
        damaged: files that were read whole, and were others than the Hub names.
    """

    checks: bool
    damaged: set[str]

    def forget_links(self) -> None:
        """Read by fresh links from here on."""
        ...


def checked(checkpoints: Iterator[Checkpoint]) -> Iterator[Checked]:
    """Yield those that can be checked, seen through views and adapters."""
    for checkpoint in checkpoints:
        stored = stored_checkpoint(checkpoint)
        if isinstance(stored, Checked):
            yield stored


def stored_checkpoint(checkpoint: Checkpoint) -> Checkpoint:
    """Return the checkpoint behind views."""
    while True:
        behind = getattr(checkpoint, "of", None) or getattr(checkpoint, "own", None)
        if behind is None:
            return checkpoint
        checkpoint = behind


def files_of(checkpoint: Checkpoint, name: str) -> set[str]:
    """Return the stored files that a tensor is read from."""
    if name not in checkpoint.tensors:
        return set()
    stored = stored_checkpoint(checkpoint)
    names = getattr(checkpoint, "stored_names", lambda name: (name,))(name)
    if not all(key in stored.tensors for key in names):
        return {file.name for file in stored.files}  # an adapter's keys are its own
    return {stored.tensors[key].file for key in names}
