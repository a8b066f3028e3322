"""A checkpoint on the Hub: pinned to a commit, read in ranges, hashed while it streams."""

import contextlib
import hashlib
from collections.abc import Iterable
from pathlib import Path

from huggingface_hub import hf_hub_download, hf_hub_url, try_to_load_from_cache
from huggingface_hub.hf_api import HfApi, ModelInfo, RepoSibling

from ..errors import (
    CheckpointFormatError,
    PickledWeightsError,
    Remedy,
    ResMergeError,
    StoppedError,
)
from ..hub.client import client, patiently
from ..hub.ranges import CachedFile, RemoteFile
from ..hub.repo import sha256_of
from ..recipe import ModelRef
from .checkpoint import Checkpoint
from .remote import Facts, Remote, unbegun


class Repository(Remote):
    """The files of a repository, or of a folder in it, at a commit.

    Args:
        ref: names it.
        info: what the Hub says of it.
        api: which asks the Hub.
        max_header_bytes: of index and headers together, at most.
    """

    def __init__(
        self, ref: ModelRef, info: ModelInfo, api: HfApi, max_header_bytes: int | None
    ) -> None:
        self._id, self._revision, self._subfolder = ref.id, info.sha, ref.subfolder
        self._info, self._api = info, api
        self._everything = {s.rfilename: s for s in info.siblings or ()}
        super().__init__(
            ref.id,
            f"{ref.id}@{ref.revision}" if ref.revision else ref.id,
            ref.subfolder or "",
            {path: sibling.size for path, sibling in self._everything.items()},
            max_header_bytes,
        )

    def small_oid(self, name: str) -> str | None:
        """Return what git calls a small file's content, where that is known for free."""
        sibling = self._everything.get(self._beside + name)
        return sibling.blob_id if sibling is not None else None

    def _facts(self, files: Iterable[str]) -> Facts:
        card = self._info.card_data
        value = card.get("license") if card is not None else None
        return Facts(
            identity={"commit": self._revision},
            revision=self._revision,
            subfolder=self._subfolder,
            license=value if isinstance(value, str) else None,
            gated=bool(self._info.gated),
            is_private=bool(self._info.private),
        )

    def _sha256(self, path: str) -> str | None:
        return sha256_of(self._everything[path])

    def _weights(self, names: list[str]) -> list[str] | None:
        """Return what `choose_weights` does; of pickles, say where they were converted."""
        try:
            return super()._weights(names)
        except PickledWeightsError as exc:
            found = self._converted()
            if found is None:
                raise
            raise PickledWeightsError(
                f"{self._id!r} has its weights in pickles, which can run code when they are read. "
                f"An open pull request has them as safetensors: give {self._id}@{found}."
            ) from exc

    def _converted(self) -> str | None:
        """Return the revision of an open pull request that has the weights as safetensors."""

        def look() -> str | None:
            for request in self._api.get_repo_discussions(
                self._id, discussion_type="pull_request", discussion_status="open"
            ):
                revision = f"refs/pr/{request.num}"
                if "safetensors" not in request.title.lower():
                    continue
                info = self._api.model_info(self._id, revision=revision, timeout=30)
                if any(s.rfilename.endswith(".safetensors") for s in info.siblings or ()):
                    return revision
            return None

        with contextlib.suppress(ResMergeError):  # advice alone: without it the error stands
            return patiently(look, what=f"look for pull requests of {self._id}")
        return None

    def _open(self, path: str) -> RemoteFile | CachedFile:
        shown, size = f"{self._id}/{path}", self._size(path.removeprefix(self._top))
        cached = try_to_load_from_cache(self._id, path, revision=self._revision)
        if isinstance(cached, str) and Path(cached).stat().st_size == size:
            return CachedFile(shown, Path(cached))
        url = hf_hub_url(self._id, path, revision=self._revision, endpoint=self._api.endpoint)
        return RemoteFile(shown, url, self._api._build_hf_headers(), size)

    def _download(self, path: str, limit: int) -> bytes:
        sibling, shown = self._everything[path], f"{self._id}/{path}"
        if sibling.size is None:
            raise CheckpointFormatError(f"the Hub does not tell the size of {shown}.")
        if sibling.size > limit:
            raise CheckpointFormatError(f"{shown} is larger than {limit} bytes.")
        data = self._downloaded(path, afresh=False)
        if not _is_of(sibling, data):
            data = self._downloaded(path, afresh=True)
            if not _is_of(sibling, data):
                raise StoppedError(
                    f"{shown}: downloaded twice, and twice its bytes are not those that the Hub "
                    "names.",
                    Remedy.CONTINUE,
                )
        return data

    def _downloaded(self, path: str, *, afresh: bool) -> bytes:
        there = patiently(
            lambda: hf_hub_download(
                self._id,
                path,
                revision=self._revision,
                token=self._api.token,
                endpoint=self._api.endpoint,
                library_name="resmerge-stream",
                force_download=afresh,
            ),
            what=f"read {self._id}/{path} on the Hub",
        )
        return Path(there).read_bytes()


def open_repository(
    ref: ModelRef,
    *,
    token: str | bool | None = None,
    commit: str | None = None,
    max_header_bytes: int | None = None,
) -> Checkpoint:
    """Read the headers, the index and the config of a repository.

    Args:
        ref: names the repository and perhaps a revision.
        token: the caller's; None stands for HF_TOKEN or the login, False for nobody's.
        commit: what an earlier start of the same run pinned the revision to.
        max_header_bytes: of index and headers together, at most.

    Raises:
        CheckpointNotFoundError: no such repository or revision, no access, or no model there.
        CheckpointFormatError: a header, the index or the config is malformed.
        UnsupportedCheckpointError: the weights are of a kind that is not read.
        StoppedError: the network or the Hub kept failing.
    """
    api = client(token)
    name = str(ref) if commit is None else f"{ref.id}@{commit}"
    with unbegun(name):
        info = patiently(
            lambda: api.model_info(
                ref.id, revision=commit or ref.revision, files_metadata=True, timeout=30
            ),
            what=f"read {name} on the Hub",
            unreachable_tries=3,
        )
    return Repository(ref, info, api, max_header_bytes).model(ref.id)


def _is_of(sibling: RepoSibling, data: bytes) -> bool:
    """Whether bytes are those of a file as the Hub names it."""
    if sibling.lfs is not None:
        return hashlib.sha256(data).hexdigest() == sibling.lfs.sha256
    blob = hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False)
    return sibling.blob_id in (None, blob.hexdigest())
