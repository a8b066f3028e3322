"""A checkpoint in a bucket of the Hub: known by the Xet hashes of its files, read in ranges."""

from collections.abc import Iterable, Mapping

from ..errors import CheckpointFormatError
from ..hub.buckets import HubBucket, InBucket
from ..hub.client import client
from ..hub.ranges import RemoteFile
from ..recipe import BUCKETS
from .adapter_config import CONFIG as ADAPTER_CONFIG
from .checkpoint import Checkpoint
from .remote import Facts, Remote, unbegun


class Bucket(Remote):
    """The files of a folder in a bucket, as they were listed: what changed since is refused.

    Args:
        bucket: asks the Hub.
        files: those in the folder, and where its config lies, by their paths in the bucket.
        folder: of the model.
        is_private: whether others may not see the bucket.
        max_header_bytes: of index and headers together, at most.
    """

    def __init__(
        self,
        bucket: HubBucket,
        files: Mapping[str, InBucket],
        folder: str,
        is_private: bool,
        max_header_bytes: int | None,
    ) -> None:
        self._bucket, self._files, self._is_private = bucket, files, is_private
        self._used: dict[str, InBucket] = {}
        at = f"{BUCKETS}{bucket.id}"
        sizes = {path: file.size for path, file in files.items()}
        super().__init__(at, at, folder, sizes, max_header_bytes)

    def check(self) -> None:
        """See that the files that make the model are as they were listed."""
        self._bucket.check(self._used)

    def _open(self, path: str) -> RemoteFile:
        return self._bucket.opened(path, self._files[path])

    def _download(self, path: str, limit: int) -> bytes:
        file = self._files[path]
        if file.size > limit:
            raise CheckpointFormatError(f"{self._at}/{path} is larger than {limit} bytes.")
        return bytes(self._bucket.opened(path, file).read(0, file.size)) if file.size else b""

    def _facts(self, files: Iterable[str]) -> Facts:
        self._used = {path: self._files[path] for path in files}
        identity = {
            path: {"size": file.size, "xet_hash": file.xet_hash}
            for path, file in self._used.items()
        }
        return Facts(identity=identity, is_private=self._is_private)


def open_bucket(
    ref_id: str,
    bucket_id: str,
    folder: str,
    *,
    token: str | bool | None = None,
    max_header_bytes: int | None = None,
) -> Checkpoint:
    """Read the headers, the index and the config of a model in a bucket.

    Args:
        ref_id: what the user calls it.
        bucket_id: ``namespace/name``.
        folder: of the model in the bucket.
        token: the caller's; None stands for HF_TOKEN or the login, False for nobody's.
        max_header_bytes: of index and headers together, at most.

    Raises:
        CheckpointNotFoundError: no such bucket, no access, or no model there.
        CheckpointFormatError: a header, the index or the config is malformed.
        UnsupportedCheckpointError: the weights are of a kind that is not read.
        SourceChangedError: a file was replaced meanwhile.
        StoppedError: the network or the Hub kept failing.
    """
    bucket = HubBucket(client(token), bucket_id)
    with unbegun(ref_id):
        is_private = bucket.is_private()
        files = bucket.files(folder)
        names = ("config.json", ADAPTER_CONFIG, "huggingface/config.json")
        own = {f"{folder}/{name}" for name in names}
        if folder and not own & files.keys():
            # A trainer's config may lie one folder up; a GGUF file is no folder.
            files |= bucket.files(folder.rpartition("/")[0])
    return Bucket(bucket, files, folder, is_private, max_header_bytes).model(ref_id)
