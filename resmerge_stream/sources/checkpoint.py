"""What every source of weights offers: the checkpoint protocol and its records."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from ..specs import TensorSpec


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

    def byte_range(self, start_row: int = 0, stop_row: int | None = None) -> tuple[int, int]:
        """Return the absolute byte offsets [begin, end) of a range of rows (first axis)."""
        rows, _ = self.spec.matrix_shape
        stop_row = rows if stop_row is None else stop_row
        row_bytes = self.spec.nbytes // rows if rows else 0
        return self.begin + start_row * row_bytes, self.begin + stop_row * row_bytes


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A weight file: its name, its size in bytes, and its sha256 where it is known for free."""

    name: str
    size: int
    sha256: str | None = None


class Checkpoint(Protocol):
    """A model's headers and configs, read; and its weights, to be read in ranges.

    Attributes:
        id: how the user named it.
        revision: the commit hash that everything is read from, or None for a folder.
        subfolder: of the repository, where it does not lie at the top.
        tensors: every tensor by name, in the order of the files and of their bytes.
        files: the weight files.
        config: the parsed ``config.json``.
        small_files: names of the other files that a model is loaded with.
        identity: what tells this checkpoint from another under the same name; JSON-able.
        license: licence id, where the checkpoint says one.
        gated: whether access must be asked for.
        is_private: whether its name may appear in a public card.
        folder: where it lies on this machine, or None.
        is_remote: whether reading weights needs the network, so that they are read ahead.
    """

    id: str
    revision: str | None
    subfolder: str | None
    tensors: Mapping[str, StoredTensor]
    files: tuple[SourceFile, ...]
    config: dict[str, Any]
    small_files: tuple[str, ...]
    identity: dict[str, Any]
    license: str | None
    gated: bool
    is_private: bool
    folder: str | None
    is_remote: bool

    def read(self, name: str, start_row: int = 0, stop_row: int | None = None) -> memoryview:
        """Return the bytes of a tensor, or of a range of its rows (first axis).

        Raises:
            StoppedError: the bytes cannot be had right now; a later run may continue.
            CheckpointFormatError: the file changed or is cut short.
        """
        ...

    def read_cost(self, name: str, start_row: int = 0, stop_row: int | None = None) -> int:
        """Return how many stored bytes `read` takes for the same rows."""
        ...

    def release(self, name: str, start_row: int = 0, stop_row: int | None = None) -> None:
        """Hint that these rows were read and may leave the memory; reading them again is fine."""
        ...

    def done_with(self, name: str, start_row: int = 0, stop_row: int | None = None) -> None:
        """Say that these rows were read for the last time in this run; never fails."""
        ...

    def read_small(self, name: str) -> bytes:
        """Return the content of one of `small_files`."""
        ...

    def small_oid(self, name: str) -> str | None:
        """Return what git calls a small file's content where that is known for free, else None."""
        ...

    def close(self) -> None:
        """Release files and connections; reading afterwards is an error."""
        ...
