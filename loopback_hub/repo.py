"""One repository on disk: its settings, its refs, and its commits with their whole file lists."""

import hashlib
import json
import os
import re
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from threading import RLock
from typing import Any

_SHA = re.compile(r"[0-9a-f]{40}")


class RevisionNotFoundError(LookupError):
    """The repository has no such branch, tag, pull request or commit."""


class StaleParentError(ValueError):
    """The branch moved on since the parent that the caller named."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One file of a commit: size, SHA-256 of its content, git blob id, and whether it is LFS."""

    size: int
    sha256: str
    oid: str
    lfs: bool

    @classmethod
    def large(cls, sha256: str, size: int) -> "Entry":
        """An LFS file; its git blob is the pointer."""
        return cls(size=size, sha256=sha256, oid=git_blob_id(pointer(sha256, size)), lfs=True)

    @classmethod
    def regular(cls, content: bytes) -> "Entry":
        """A file that git itself holds."""
        sha256 = hashlib.sha256(content).hexdigest()
        return cls(size=len(content), sha256=sha256, oid=git_blob_id(content), lfs=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Commit:
    """An immutable commit with the complete list of its files."""

    id: str
    parent: str | None
    title: str
    description: str
    author: str
    date: str
    files: Mapping[str, Entry]


def pointer(sha256: str, size: int) -> bytes:
    """The text that git stores in place of an LFS file."""
    return (
        f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()
    )


def git_blob_id(content: bytes) -> str:
    """The SHA-1 under which git stores a blob."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def now() -> str:
    """The present time in the Hub's notation."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def write_json(path: Path, value: Any) -> None:
    """Replace a JSON file in one step, so that a killed server never leaves half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    temporary.write_text(json.dumps(value))
    os.replace(temporary, path)


@dataclass(frozen=True, slots=True, kw_only=True)
class Repo:
    """A handle on one repository's folder; everything is read from and written to disk."""

    kind: str
    id: str
    root: Path
    lock: RLock

    @property
    def namespace(self) -> str:
        """The user or organisation that owns it."""
        return self.id.split("/")[0]

    @property
    def page(self) -> str:
        """The path of its page and of its git endpoints."""
        return f"/{self.id}" if self.kind == "models" else f"/{self.kind}/{self.id}"

    @property
    def settings(self) -> dict[str, Any]:
        """Visibility, gating, who was granted access, which token created it, when."""
        settings: dict[str, Any] = json.loads((self.root / "repo.json").read_text())
        return settings

    def update_settings(self, **changes: Any) -> None:
        """Change some settings."""
        with self.lock:
            write_json(self.root / "repo.json", {**self.settings, **changes})

    def refs(self) -> dict[str, str]:
        """Full ref name (`refs/heads/main`) → commit id."""
        refs: dict[str, str] = json.loads((self.root / "refs.json").read_text())
        return refs

    def set_ref(self, ref: str, commit: str | None) -> None:
        """Move, create or (with None) delete a ref."""
        with self.lock:
            refs = self.refs() if (self.root / "refs.json").exists() else {}
            if commit is None:
                del refs[ref]
            else:
                refs[ref] = commit
            write_json(self.root / "refs.json", refs)

    def ref_of(self, revision: str) -> str | None:
        """The full ref that a revision names, if it is a name and not a commit id."""
        refs = self.refs()
        names = (revision, f"refs/heads/{revision}", f"refs/tags/{revision}")
        return next((name for name in names if name in refs), None)

    def at(self, revision: str) -> Commit:
        """The commit that a branch, tag, full ref or commit id names.

        Raises:
            RevisionNotFoundError: there is none.
        """
        ref = self.ref_of(revision)
        commit_id = self.refs()[ref] if ref else revision
        path = self.root / "commits" / f"{commit_id}.json"
        if not _SHA.fullmatch(commit_id) or not path.exists():
            raise RevisionNotFoundError(revision)
        stored = json.loads(path.read_text())
        files = {name: Entry(**entry) for name, entry in stored.pop("files").items()}
        return Commit(files=files, **stored)

    def history(self, revision: str) -> Iterator[Commit]:
        """The commits behind a revision, newest first."""
        parent: str | None = revision
        while parent is not None:
            commit = self.at(parent)
            yield commit
            parent = commit.parent

    def commit(
        self,
        ref: str,
        changes: Mapping[str, Entry | None],
        *,
        title: str,
        description: str = "",
        author: str = "hub",
        base: str | None = None,
        expected_parent: str | None = None,
    ) -> Commit:
        """Add a commit and move the ref to it.

        Args:
            ref: full ref name, e.g. `refs/heads/main`.
            changes: path → new entry, or None to remove the file.
            title: first line of the message.
            description: the rest of it.
            author: name of a user.
            base: revision to build on; default: the ref itself.
            expected_parent: refuse unless the base is still at this commit.

        Raises:
            StaleParentError: the base is no longer at `expected_parent`.
        """
        with self.lock:
            parent = self.at(base or ref)
            if expected_parent is not None and parent.id != expected_parent:
                raise StaleParentError(expected_parent)
            files = {**parent.files, **changes}
            kept = {path: entry for path, entry in files.items() if entry is not None}
            return self.write(
                ref, kept, title=title, description=description, author=author, parent=parent.id
            )

    def write(
        self,
        ref: str,
        files: Mapping[str, Entry],
        *,
        title: str,
        parent: str | None,
        description: str = "",
        author: str = "hub",
    ) -> Commit:
        """Write a commit with exactly these files, then move the ref to it."""
        body = {
            "parent": parent,
            "title": title,
            "description": description,
            "author": author,
            "date": now(),
            "files": {path: asdict(files[path]) for path in sorted(files)},
        }
        unique = json.dumps([body, uuid.uuid4().hex]).encode()
        commit_id = hashlib.sha1(unique).hexdigest()
        write_json(self.root / "commits" / f"{commit_id}.json", {"id": commit_id, **body})
        self.set_ref(ref, commit_id)
        return self.at(commit_id)
