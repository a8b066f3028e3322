"""The catalogue of repositories, and how a file of a given name and size is kept in them."""

import fnmatch
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from threading import RLock
from typing import Any

from .objects import Objects, Sparse
from .repo import Entry, Repo, now, write_json

_LFS_SUFFIXES = (
    "7z arrow bin ckpt ftz gz h5 joblib model msgpack npy npz onnx parquet pb pickle pkl pt pth "
    "safetensors tar tflite tgz xz zip zst"
)
LFS_PATTERNS = (*(f"*.{suffix}" for suffix in _LFS_SUFFIXES.split()), "*tfevents*")
LARGEST_REGULAR_FILE = 10 * 1024**2
GITATTRIBUTES = "".join(f"{name} filter=lfs diff=lfs merge=lfs -text\n" for name in LFS_PATTERNS)

Content = bytes | str | Path | Sparse
"""What can be put into a repository: bytes, text, a file (linked, not copied), a sparse file."""


def is_large(path: str, size: int, sample: bytes) -> bool:
    """Whether the Hub keeps such a file outside git: by name, by size, or as it is no text."""
    name = path.rsplit("/", 1)[-1]
    by_name = any(fnmatch.fnmatch(name, pattern) for pattern in LFS_PATTERNS)
    return by_name or size > LARGEST_REGULAR_FILE or b"\0" in sample


@dataclass(frozen=True, slots=True)
class Store:
    """All repositories under one folder."""

    root: Path
    objects: Objects
    lock: RLock = field(default_factory=RLock)

    def repo(self, kind: str, repo_id: str) -> Repo | None:
        """The repository of that name, or None."""
        repo = Repo(kind=kind, id=repo_id, root=self.root / kind / repo_id, lock=self.lock)
        return repo if (repo.root / "refs.json").exists() else None

    def repos(self, kind: str) -> Iterator[Repo]:
        """All repositories of one kind, by name."""
        for path in sorted((self.root / kind).glob("*/*/refs.json")):
            yield Repo(kind=kind, id="/".join(path.parts[-3:-1]), root=path.parent, lock=self.lock)

    def create(
        self,
        kind: str,
        repo_id: str,
        *,
        private: bool,
        gated: bool | str = False,
        created_by: str | None = None,
    ) -> Repo:
        """Create a repository with the Hub's first commit, a `.gitattributes`.

        `created_by` is the creator's `Identity.maker`; a token of role `contribute` may write to
        what it, or its app, created.
        """
        repo = Repo(kind=kind, id=repo_id, root=self.root / kind / repo_id, lock=self.lock)
        settings: dict[str, Any] = {
            "private": private,
            "gated": gated,
            "granted": [],
            "created": now(),
            "created_by": created_by,
        }
        with self.lock:
            if (repo.root / "refs.json").exists():
                raise FileExistsError(repo_id)
            write_json(repo.root / "repo.json", settings)
            first = {".gitattributes": self.entry(".gitattributes", GITATTRIBUTES)}
            repo.write("refs/heads/main", first, title="initial commit", parent=None)
        return repo

    def delete(self, repo: Repo) -> None:
        """Remove a repository; objects stay, as other repositories may use them."""
        shutil.rmtree(repo.root)

    def entry(self, path: str, content: Content, *, fake_above: int | None = None) -> Entry:
        """Store one file's content and return how a commit refers to it.

        For `fake_above` see `Objects.add_file`.
        """
        if isinstance(content, Sparse):
            return Entry.large(self.objects.add_sparse(content), content.size)
        if isinstance(content, Path):
            with content.open("rb") as file:
                sample = file.read(512)
            size = content.stat().st_size
            if size and is_large(path, size, sample):
                return Entry.large(self.objects.add_file(content, fake_above=fake_above), size)
            content = content.read_bytes()
        if isinstance(content, str):
            content = content.encode()
        sha256 = self.objects.add_bytes(content)
        if content and is_large(path, len(content), content[:512]):
            return Entry.large(sha256, len(content))
        return Entry.regular(content)

    def used(self, namespace: str) -> int:
        """Bytes of the LFS objects in a namespace's private repositories, each counted once."""
        sizes: dict[str, int] = {}
        for repo in self.repos("models"):
            if repo.namespace == namespace and repo.settings["private"]:
                for commit_id in set(repo.refs().values()):
                    entries = repo.at(commit_id).files.values()
                    sizes.update({entry.sha256: entry.size for entry in entries if entry.lfs})
        return sum(sizes.values())


def folder_files(folder: Path) -> Mapping[str, Path]:
    """All files of a folder by their path in it, without hidden folders and `.gitattributes`."""
    paths = (path for path in sorted(folder.rglob("*")) if path.is_file())
    files = {path.relative_to(folder).as_posix(): path for path in paths}
    return {name: path for name, path in files.items() if not name.startswith(".")}
