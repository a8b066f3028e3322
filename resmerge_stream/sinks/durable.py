"""A small file is there whole, or as it was before."""

import os
from pathlib import Path


def temporary(name: str) -> str:
    """Return what a file is called while it is written."""
    return f".{name}.tmp"


def write_durably(path: Path, data: bytes, *, mode: int = 0o666, by: str = "") -> None:
    """Write a file, flushed to the disk, in place of an earlier one.

    Args:
        path: the file; its folder is there.
        data: all of it.
        mode: who may read it, of a new file, before the process's umask.
        by: names the writer, where several may write it at once.

    Raises:
        OSError: it cannot be written; an earlier one is as it was.
    """
    part = path.with_name(temporary(f"{path.name}.{by}" if by else path.name))
    try:
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        with os.fdopen(os.open(part, flags, mode), "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError:
        part.unlink(missing_ok=True)
        raise
