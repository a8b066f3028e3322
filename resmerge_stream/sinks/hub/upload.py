"""Sending shards to the Hub behind the merge: three ways, one protocol.

Each is a sender: it opens a shard, keeps it here until it is sent, and sends it.
"""

import io
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, BinaryIO

from huggingface_hub import CommitOperationAdd
from huggingface_hub.utils._xet import (
    XetTokenType,
    get_xet_session,
    xet_connection_info_refresh_url,
    xet_headers_without_auth,
)

from ...errors import StoppedError
from ...hub.client import FAILURES, explain, patiently
from ...hub.repo import HubRepo
from ..folder import FolderSink
from ..layout import Shard
from ..sink import ShardWriter
from .deposit import deposited, deposited_file

_SAMPLE_BYTES = 512
# A signed link may be refused once, and a new one taken: each try asks for one.
_REFUSED_TRIES = 4


class _Watched(CommitOperationAdd):
    """A file to be sent, which tells how far it was read."""

    now_at: Callable[[int], None]

    @contextmanager
    def as_file(self, with_tqdm: bool = False) -> Iterator[BinaryIO]:
        now_at = self.now_at

        class File(io.FileIO):
            def read(self, size: int | None = -1, /) -> bytes:
                data = super().read(-1 if size is None else size)
                now_at(self.tell())
                return data

        with File(str(self.path_or_fileobj)) as file:
            yield file


class FileSender:
    """Sends shards from files, for a commit to a branch.

    Args:
        shelf: where the files lie until then.
        repo: where to.
        branch: of the commit to come.
        create_pr: whether that commit will open a pull request, for which reading is right enough.
    """

    def __init__(
        self, shelf: FolderSink, repo: HubRepo, branch: str, *, create_pr: bool = False
    ) -> None:
        self._shelf, self._repo, self._branch, self._create_pr = shelf, repo, branch, create_pr

    def open_shard(self, shard: Shard) -> ShardWriter:
        """Start a shard."""
        return self._shelf.open_shard(shard)

    def keep(self, shard: Shard, entry: Mapping[str, Any]) -> None:
        """Record a finished shard here, so that another run only has to send it."""
        self._shelf.keep(shard, entry)

    def send(
        self, entry: Mapping[str, Any], now_at: Callable[[int], None]
    ) -> tuple[CommitOperationAdd | None, Mapping[str, Any]]:
        """Send a finished shard; return what commits it, if anything yet, and its row as staged.

        Args:
            entry: its row of the journal.
            now_at: is called with how many of its bytes were read to be sent, where that is known.

        Raises:
            StoppedError: the network or the Hub kept failing, or the storage is full.
        """
        name = str(entry["name"])
        operation = _Watched(name, str(self._shelf.path_of(name)))
        operation.now_at = now_at
        operation.upload_info.sha256 = bytes.fromhex(str(entry["sha256"]))
        patiently(
            lambda: self._repo.api.preupload_lfs_files(
                self._repo.id,
                [operation],
                revision=self._branch,
                create_pr=self._create_pr,
                free_memory=False,
            ),
            what=f"send {name} to {self._repo.id}",
            refused_tries=_REFUSED_TRIES,
        )
        return operation, entry


class DepositSender(FileSender):
    """Sends shards to where they will stand, for the very last commit. See `deposit`."""

    def send(
        self, entry: Mapping[str, Any], now_at: Callable[[int], None]
    ) -> tuple[CommitOperationAdd | None, Mapping[str, Any]]:
        """Send a finished shard, which nothing commits yet."""
        super().send(entry, now_at)
        return None, deposited(entry)


class StreamSender(FileSender):
    """Sends shards while they are merged; only what an earlier run left here is a file."""

    def __init__(self, shelf: FolderSink, repo: HubRepo, branch: str) -> None:
        super().__init__(shelf, repo, branch)
        self._streamed: dict[str, StreamedShard] = {}

    def open_shard(self, shard: Shard) -> ShardWriter:
        """Start sending a shard."""
        writer = StreamedShard(self._repo, self._branch, shard)
        self._streamed[shard.name] = writer
        return writer

    def keep(self, shard: Shard, entry: Mapping[str, Any]) -> None:
        """Do nothing: it is sent already."""

    def send(
        self, entry: Mapping[str, Any], now_at: Callable[[int], None]
    ) -> tuple[CommitOperationAdd | None, Mapping[str, Any]]:
        """Return what commits a shard that is there already."""
        streamed = self._streamed.pop(str(entry["name"]), None)
        return (streamed.operation(), entry) if streamed else super().send(entry, now_at)


class StreamedShard:
    """A shard that goes to Xet storage while it is merged: no file, no copy in memory.

    huggingface_hub has no call for this; `operation` is what its own upload leaves behind.

    Args:
        repo: where to.
        branch: of the commit to come.
        shard: the planned shard.

    Raises:
        StoppedError: the network or the Hub fails.
    """

    def __init__(self, repo: HubRepo, branch: str, shard: Shard) -> None:
        self._repo, self._shard = repo, shard
        self._written, self._sample = 0, b""
        import hf_xet  # type: ignore[import-untyped]  # only where something is streamed

        headers = repo.api._build_hf_headers()
        url = xet_connection_info_refresh_url(
            token_type=XetTokenType.WRITE,
            repo_id=repo.id,
            repo_type="model",
            revision=branch,
            endpoint=repo.api.endpoint,
        )
        try:
            session = get_xet_session()  # type: ignore[no-untyped-call]
            self._commit = session.new_upload_commit(
                token_refresh_url=url,
                token_refresh_headers=headers,
                custom_headers=xet_headers_without_auth(headers),
            )
            self._stream = self._commit.__enter__().start_upload_stream(
                name=shard.name, sha256=hf_xet.COMPUTE_SHA256
            )
        except FAILURES as exc:
            raise self._explained(exc) from exc
        self.sha256 = ""
        self.write(memoryview(shard.header))

    def write(self, data: memoryview) -> None:
        """Append bytes.

        Raises:
            StoppedError: the network or the Hub fails.
        """
        piece = bytes(data)
        if len(self._sample) < _SAMPLE_BYTES:
            self._sample = (self._sample + piece[:_SAMPLE_BYTES])[:_SAMPLE_BYTES]
        try:
            self._stream.write(piece)
        except FAILURES as exc:
            raise self._explained(exc) from exc
        self._written += len(piece)

    def finish(self) -> str:
        """Wait until the storage has everything, and return the sha256 in hex.

        Raises:
            StoppedError: the network or the Hub fails.
        """
        if self._written != self._shard.nbytes:
            raise RuntimeError(
                f"{self._shard.name}: wrote {self._written} of {self._shard.nbytes} bytes"
            )
        try:
            meta = self._stream.finish()
            self._commit.__exit__(None, None, None)
        except FAILURES as exc:
            raise self._explained(exc) from exc
        self.sha256 = str(meta.xet_info.sha256)
        return self.sha256

    def abort(self) -> None:
        """Give up; the storage forgets what no commit names."""
        error = StoppedError("given up")
        try:
            self._commit.__exit__(StoppedError, error, None)
        except FAILURES:
            return

    def operation(self) -> CommitOperationAdd:
        """Return what commits the shard."""
        entry = {"name": self._shard.name, "size": self._written, "sha256": self.sha256}
        return deposited_file(entry, self._sample)

    def _explained(self, exc: BaseException) -> Exception:
        return explain(exc, f"send {self._shard.name} to {self._repo.id}")
