"""File contents by their SHA-256: written here, linked in place, or sparse."""

import hashlib
import os
import uuid
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Sparse:
    """A file of `size` bytes that starts with `head` and is zero after it; it takes no disk."""

    head: bytes
    size: int


@dataclass(frozen=True, slots=True)
class Objects:
    """The contents that a Hub holds, one file each, named by SHA-256."""

    root: Path

    def path(self, sha256: str) -> Path:
        """Where the object of that name lies, whether it exists or not."""
        return self.root / sha256[:2] / sha256

    def __contains__(self, sha256: str) -> bool:
        return self.path(sha256).exists()

    def size(self, sha256: str) -> int:
        """Size of an existing object in bytes."""
        return self.path(sha256).stat().st_size

    def temporary(self) -> Path:
        """A fresh path on the same file system, for an object that is still being written."""
        folder = self.root / "incoming"
        folder.mkdir(parents=True, exist_ok=True)
        return folder / uuid.uuid4().hex

    def adopt(self, written: Path, sha256: str) -> None:
        """Give a completely written file its name; the rename is what makes it exist."""
        self.path(sha256).parent.mkdir(parents=True, exist_ok=True)
        os.replace(written, self.path(sha256))

    def add_bytes(self, content: bytes) -> str:
        """Store bytes and return their SHA-256."""
        sha256 = hashlib.sha256(content).hexdigest()
        if sha256 not in self:
            written = self.temporary()
            written.write_bytes(content)
            self.adopt(written, sha256)
        return sha256

    def add_file(self, source: Path, *, fake_above: int | None = None) -> str:
        """Link a file without copying it and return its name.

        Args:
            source: a file that stays as it is while the Hub is in use.
            fake_above: files larger than this many bytes are not read; their name is then made from
                path, size and time, and is no hash of the content.
        """
        status = source.stat()
        if fake_above is not None and status.st_size > fake_above:
            label = f"{source.resolve()}:{status.st_size}:{status.st_mtime_ns}"
            sha256 = hashlib.sha256(label.encode()).hexdigest()
        else:
            with source.open("rb") as file:
                sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        if sha256 not in self:
            # A hard link changes the ctime, which a merge of the file takes for a write.
            link = self.temporary()
            link.symlink_to(source.resolve())
            self.adopt(link, sha256)
        return sha256

    def add_sparse(self, sparse: Sparse) -> str:
        """Create a sparse file; its name is made from head and size and hashes nothing more."""
        label = hashlib.sha256(sparse.head)
        label.update(sparse.size.to_bytes(8, "little"))
        sha256 = label.hexdigest()
        if sha256 not in self:
            written = self.temporary()
            written.write_bytes(sparse.head)
            os.truncate(written, sparse.size)
            self.adopt(written, sha256)
        return sha256
