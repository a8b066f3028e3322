"""Xet storage in hf_xet's own `local://` stores, arranged for several processes at once.

A `local://` store has a database that only one process may open. So every writing process gets a
store of its own, what readers want is gathered in the Hub's pool, and every reader gets a snapshot
of the pool: links to its data beside a copy of its database. The Hub itself opens its pool and
snapshots, never a writer's store.
"""

import shutil
import time
import uuid
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from threading import RLock
from typing import Any

import hf_xet

from .objects import Objects
from .shards import XetFile, read_shard

_DATABASE = "global_dedup_lookup.redb"
_TRIES = 5


@dataclass(slots=True)
class XetStores:
    """The stores of all writers, the pool, and the snapshots."""

    root: Path
    objects: Objects
    _files: dict[str, tuple[Path, XetFile]] = field(default_factory=dict)
    _seen: set[Path] = field(default_factory=set)
    _lock: RLock = field(default_factory=RLock)  # held while contents move, which takes time
    _index_lock: RLock = field(default_factory=RLock)

    def writing_url(self, client: object) -> str:
        """Where a client may write; always the same for the same client."""
        store = self.root / "writers" / str(client)
        store.mkdir(parents=True, exist_ok=True)
        return f"local://{store.resolve()}"

    def reading_url(self, wanted: Iterable[str]) -> str:
        """Where a client may read the wanted objects that came by Xet; a new snapshot each time."""
        with self._lock:
            for sha256 in wanted:
                found = self.find(sha256)
                if found is not None and not self._in_pool(sha256):
                    self.materialise(sha256)
                    self.ingest(sha256)
            return f"local://{self._snapshot(self._pool).resolve()}"

    def find(self, sha256: str) -> XetFile | None:
        """The Xet file with that content, if any store has it."""
        if sha256 not in self._files:
            self._scan()
        return self._files[sha256][1] if sha256 in self._files else None

    def materialise(self, sha256: str) -> None:
        """Write a Xet file's content out as a plain object, unless that exists already."""
        with self._lock:
            if sha256 in self.objects:
                return
            self._scan()
            store, file = self._files[sha256]
            for attempt in range(_TRIES):
                try:
                    self._download(store, file)
                    return
                except RuntimeError:  # the copied database was caught in the middle of a write
                    if attempt == _TRIES - 1:
                        raise
                    time.sleep(0.2)

    def ingest(self, sha256: str) -> None:
        """Put a plain object into the pool, from where it can be read by Xet."""
        with self._lock, self._session(self._pool, "new_upload_commit") as upload:
            upload.start_upload_file(str(self.objects.path(sha256).resolve()), sha256=sha256)

    @property
    def _pool(self) -> Path:
        return self.root / "pool"

    def _in_pool(self, sha256: str) -> bool:
        self._scan()
        return self._files[sha256][0] == self._pool

    def _scan(self) -> None:
        with self._index_lock:
            for store in (*sorted((self.root / "writers").glob("*")), self._pool):
                for shard in sorted((store / "xet/xorbs/shards").glob("*.mdb")):
                    if shard not in self._seen:
                        self._files |= {file.sha256: (store, file) for file in read_shard(shard)}
                        self._seen.add(shard)

    def _snapshot(self, store: Path) -> Path:
        snapshot = self.root / "snapshots" / uuid.uuid4().hex
        (snapshot / "xet/xorbs").mkdir(parents=True)
        source = (store / "xet/xorbs").resolve()
        for name in ("xorbs", "shards"):
            (source / name).mkdir(parents=True, exist_ok=True)
            (snapshot / "xet/xorbs" / name).symlink_to(source / name)
        if (source / _DATABASE).exists():
            shutil.copyfile(source / _DATABASE, snapshot / "xet/xorbs" / _DATABASE)
        return snapshot

    def _download(self, store: Path, file: XetFile) -> None:
        written = self.objects.temporary()
        snapshot = self._snapshot(store)
        try:
            with self._session(snapshot, "new_file_download_group") as download:
                download.start_download_file(hf_xet.XetFileInfo(file.hash, file.size), str(written))
        finally:
            shutil.rmtree(snapshot)
        self.objects.adopt(written, file.sha256)

    def _session(self, store: Path, kind: str) -> Any:
        store.mkdir(parents=True, exist_ok=True)
        url = f"local://{store.resolve()}"
        return getattr(hf_xet.XetSession(), kind)(
            endpoint=url, token="-", token_expiry_unix_secs=2**40
        )
