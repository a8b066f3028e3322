"""Who may write: locks that lie with what is written, so that every machine that sees it sees them.

Some file systems keep no locks (buckets and shares that are mounted, as a rule). There nobody is
refused; the mark of a folder says whose it is, and whoever finds another's mark stops.
"""

import contextlib
import errno
import fcntl
import os
from pathlib import Path
from typing import IO, Any

from ..errors import StoppedError

_UNSUPPORTED = {
    errno.ENOTSUP,
    errno.EOPNOTSUPP,
    errno.ENOLCK,
    errno.ENOSYS,
    errno.EINVAL,
    errno.EBADF,  # a network's folder takes no exclusive lock of what is open for reading
}
# How often a lock's file may be another one after it was locked.
_TRIES = 10


def locked(file: IO[Any] | int, kind: int) -> bool:
    """Lock an open file; return False where its file system keeps no locks.

    Args:
        file: open, or its number.
        kind: as of ``flock``.

    Raises:
        BlockingIOError: another process holds it, and `kind` says not to wait.
        OSError: the file system failed.
    """
    try:
        fcntl.flock(file, kind)
    except BlockingIOError:
        raise
    except OSError as exc:
        if exc.errno in _UNSUPPORTED:
            return False
        raise
    return True


def keeps_locks(folder: Path) -> bool:
    """Return whether the file system of a folder, or of what it will lie in, keeps locks."""
    there = next((path for path in (folder, *folder.absolute().parents) if path.is_dir()), None)
    if there is None:
        return True
    try:
        handle = os.open(there, os.O_RDONLY)
    except OSError:
        return True  # what is wrong with it is said elsewhere
    try:
        return locked(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(handle)


class HeldError(StoppedError):
    """Another process writes there."""


class Lock:
    """A file that is held while something beside it is written.

    Args:
        path: of the file, made when missing.
        shown: what is written, for errors.
    """

    def __init__(self, path: Path, shown: str) -> None:
        self._path, self._shown = path, shown
        self._file: IO[str] | None = None

    def take(self, *, alone: bool, waits: bool = False) -> None:
        """Hold it, or change how it is held; whoever holds it alone is the only one.

        Args:
            alone: whether nobody else may hold it.
            waits: whether to wait for whoever holds it, rather than to give up.

        Raises:
            HeldError: another process holds it.
            OSError: it cannot be made.
        """
        kind = (fcntl.LOCK_EX if alone else fcntl.LOCK_SH) | (0 if waits else fcntl.LOCK_NB)
        for _ in range(_TRIES):
            file = self._file or self._path.open("a")
            try:
                is_kept = locked(file, kind)
            except BlockingIOError as exc:
                self.close()
                file.close()
                raise HeldError(
                    f"another process is merging into {self._shown}. Wait for it, or stop it."
                ) from exc
            self._file = file
            if not is_kept:
                return
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file.fileno()), self._path.stat()):
                    return
            self.close()  # its last holder removed it in between
        self._file = self._path.open("a")

    def remove(self) -> None:
        """Remove the file while it is held: what it was for is done."""
        self._path.unlink(missing_ok=True)

    def close(self) -> None:
        """Let it go."""
        if self._file is not None:
            self._file.close()
            self._file = None
