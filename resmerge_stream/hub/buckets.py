"""A bucket of the Hub: its files as they are now. There are no commits; Xet hashes tell files."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import islice
from urllib.parse import quote

from huggingface_hub import BucketFile, BucketFolder, HfApi

from ..errors import CheckpointNotFoundError
from ..recipe import BUCKETS
from .client import patiently
from .ranges import RemoteFile, replaced

# More than a run of many checkpoints has.
_MOST_FILES = 100_000


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
        """Return the files below a folder, by their paths in the bucket.

        Raises:
            CheckpointNotFoundError: as `is_private`; or there are more files than are listed.
            StoppedError: the Hub kept failing.
        """

        def listed() -> list[BucketFile | BucketFolder]:
            tree = self.api.list_bucket_tree(self.id, folder or None, recursive=True)
            return list(islice(tree, _MOST_FILES + 1))

        found = patiently(
            listed,
            what=f"list the bucket {self.id} on the Hub",
            unreachable_tries=3,
        )
        if len(found) > _MOST_FILES:
            raise CheckpointNotFoundError(
                f"{BUCKETS}{self.id}/{folder} holds more than {_MOST_FILES} files. Name the folder "
                "of the model itself."
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
