"""Where a model's bytes are: what lies in which weight file, and how ranges of files are read."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass

from ..specs import TensorSpec
from .ahead import Ahead, ByteRange

# Some rows (first axis) of a tensor are a slice without a step; this is all of them.
ALL = slice(None)


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where a tensor's bytes are.

    Attributes:
        spec: name, dtype and shape.
        file: the weight file that holds it.
        begin: absolute offset of its first byte in that file.
    """

    spec: TensorSpec
    file: str
    begin: int

    def byte_range(self, rows: slice = ALL) -> tuple[int, int]:
        """Return the absolute byte offsets [begin, end) of some rows (first axis)."""
        count, _ = self.spec.matrix_shape
        start, stop, _ = rows.indices(count)
        row_bytes = self.spec.nbytes // count if count else 0
        return self.begin + start * row_bytes, self.begin + stop * row_bytes


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A weight file: its name, its size in bytes, and its sha256 where it is known for free."""

    name: str
    size: int
    sha256: str | None = None


class Store(ABC):
    """The files of one model: a folder, a repository at a commit, a bucket. Ranges: [begin, end).

    Attributes:
        ahead: what fetches ranges before they are read, while a merge lets it.
        checks: whether files are hashed while they are read, where the Hub names their sha256.
        damaged: files that were read whole, and were others than the Hub names.
    """

    ahead: Ahead | None = None
    checks: bool = False
    damaged: frozenset[str] = frozenset()

    @abstractmethod
    def read(self, file: str, begin: int, end: int) -> memoryview:
        """Return a range of a weight file.

        Raises:
            StoppedError: the bytes cannot be had right now; a later run may continue.
            CheckpointFormatError: the file changed or is cut short.
        """

    def expect(self, ranges: Iterable[tuple[str, int, int]]) -> None:
        """Hint which small ranges are read next while a model is opened: file, begin, end."""

    def span(self, file: str, begin: int, end: int) -> ByteRange | None:
        """Return what has to be fetched for a range; None where it is on this machine."""
        return None

    def release(self, file: str, begin: int, end: int) -> None:
        """Hint that a range was read and may leave the memory; reading it again is fine."""

    @abstractmethod
    def done_with(self, file: str, begin: int, end: int) -> None:
        """Say that a range was read for the last time in this run, and that it went well.

        Raises:
            SourceChangedError: the file changed, so that its bytes may not be used.
            CheckpointNotFoundError: it is gone.
            StoppedError: its disk failed.
        """

    @abstractmethod
    def check(self) -> None:
        """See that all weight files are those whose headers were read; raises as `done_with`."""

    def forget_links(self) -> None:
        """Read by fresh links from here on."""

    @abstractmethod
    def read_small(self, name: str) -> bytes:
        """Return the content of one of the files beside the weights."""

    def small_oid(self, name: str) -> str | None:
        """Return what git calls a small file's content where that is known for free, else None."""
        return None

    @abstractmethod
    def close(self) -> None:
        """Release files and connections; reading afterwards is an error."""
