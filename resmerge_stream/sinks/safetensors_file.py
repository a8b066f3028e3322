"""A safetensors file written front to back: planned header first, then each tensor's bytes."""

import hashlib
import os
from pathlib import Path

from ..errors import Remedy, StoppedError
from .layout import Shard


class SafetensorsFile:
    """Writes one shard to a temporary name; sha256 is taken on the way.

    Args:
        path: the temporary file; replaced when it exists.
        shard: the planned shard.

    Raises:
        StoppedError: the disk is full, or the file cannot be written.
    """

    def __init__(self, path: Path, shard: Shard) -> None:
        self._path, self._shard = path, shard
        self._hash = hashlib.sha256()
        self._written = 0
        try:
            self._file = path.open("wb", buffering=0)
        except OSError as exc:
            raise _stopped(path, exc) from exc
        try:
            self.write(memoryview(shard.header))
        except StoppedError:
            self.abort()  # nobody else knows of it yet
            raise

    def write(self, data: memoryview) -> None:
        """Append bytes and hash them.

        Raises:
            StoppedError: the disk is full, or the file cannot be written.
        """
        try:
            view = data
            while len(view):
                view = view[self._file.write(view) :]
        except OSError as exc:
            raise _stopped(self._path, exc) from exc
        self._hash.update(data)
        self._written += len(data)

    def finish(self) -> str:
        """Check the size, flush to the disk, and return the sha256 in hex.

        Raises:
            StoppedError: the disk fails.
        """
        if self._written != self._shard.nbytes:
            raise RuntimeError(
                f"{self._shard.name}: wrote {self._written} of {self._shard.nbytes} bytes"
            )
        try:
            os.fsync(self._file.fileno())
            self._file.close()
        except OSError as exc:
            raise _stopped(self._path, exc) from exc
        return self._hash.hexdigest()

    def abort(self) -> None:
        """Close and remove the unfinished file."""
        self._file.close()
        self._path.unlink(missing_ok=True)


def _stopped(path: Path, exc: OSError) -> StoppedError:
    return StoppedError(
        f"cannot write {str(path)!r}: {exc.strerror}. Finished shards are kept. Free some space or "
        "restore the permission first.",
        Remedy.CONTINUE,
    )
