"""A bucket of the Hub: its files as they are now. There are no commits; Xet hashes tell files."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from urllib.parse import quote

from huggingface_hub import BucketFile, HfApi

from ..errors import CheckpointNotFoundError
from .client import patiently
from .ranges import RemoteFile, replaced


@dataclass(frozen=True, slots=True)
class InBucket:
    """A file: its size in bytes, and what Xet calls its content."""

    size: int
    xet_hash: str


class HubBucket:
    """One bucket.

    Args:
        api: the library's client, with the caller's token.
        bucket_id: ``namespace/name``.
    """

    def __init__(self, api: HfApi, bucket_id: str) -> None:
        self.api, self.id = api, bucket_id

    def is_private(self) -> bool:
        """Return whether others may not see it.

        Raises:
            CheckpointNotFoundError: there is none, or this caller may not see it.
            StoppedError: the Hub kept failing.
        """
        info = patiently(
            lambda: self.api.bucket_info(self.id),
            what=f"read the bucket {self.id} on the Hub",
            unreachable_tries=3,
        )
        return info.private

    def files(self, folder: str = "") -> dict[str, InBucket]:
        """Return the files below a folder, by their paths in the bucket; raises as `is_private`."""
        found = patiently(
            lambda: list(self.api.list_bucket_tree(self.id, folder or None, recursive=True)),
            what=f"list the bucket {self.id} on the Hub",
            unreachable_tries=3,
        )
        # The Hub takes any beginning of a path for a folder.
        top = f"{folder}/" if folder else ""
        return {
            one.path: InBucket(one.size, one.xet_hash)
            for one in found
            if isinstance(one, BucketFile) and one.path.startswith(top)
        }

    def check(self, files: Mapping[str, InBucket]) -> None:
        """See that files are as they were.

        Args:
            files: by their paths, as they were listed.

        Raises:
            SourceChangedError: one was replaced.
            CheckpointNotFoundError: one is gone.
            StoppedError: the Hub kept failing.
        """
        paths: Iterable[str] = sorted(files)
        found = patiently(
            lambda: list(self.api.get_bucket_paths_info(self.id, paths)),
            what=f"look at the bucket {self.id} on the Hub",
        )
        now = {one.path: InBucket(one.size, one.xet_hash) for one in found}
        for path, known in files.items():
            shown = f"hf://buckets/{self.id}/{path}"
            if path not in now:
                raise CheckpointNotFoundError(
                    f"{shown} is gone since this command first looked at it. Put it back."
                )
            if now[path] != known:
                raise replaced(shown)

    def opened(self, path: str, file: InBucket) -> RemoteFile:
        """Return a file to be read in ranges, as long as it is as it was."""
        url = f"{self.api.endpoint}/buckets/{self.id}/resolve/{quote(path)}"
        headers = self.api._build_hf_headers()
        shown = f"hf://buckets/{self.id}/{path}"
        return RemoteFile(shown, url, headers, file.size, xet_hash=file.xet_hash)
