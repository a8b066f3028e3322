"""Shards that wait in the target's large-file storage, where no commit names them yet.

Into a public repository nothing half-made may be committed, and what was committed to the private
repository beside it can be taken over by reference only where both are in Xet storage. Without it a
shard is sent to where it will stand: nobody sees it there until the commit on main names it. The
staging branch holds its row of the journal alone.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from huggingface_hub import CommitOperationAdd
from huggingface_hub.lfs import UploadInfo, post_lfs_batch_info

from ...hub.client import patiently
from ...hub.repo import HubRepo

# The Hub takes so many objects in one request.
_BATCH = 256
_KEY = "deposited"


def deposited(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Return a shard's row of the journal, saying where it waits."""
    return {**entry, _KEY: True}


def is_deposited(entry: Mapping[str, Any]) -> bool:
    """Whether a row's shard waits in the target's storage rather than on the staging branch."""
    return entry.get(_KEY) is True


def missing_from(
    repo: HubRepo, entries: Iterable[Mapping[str, Any]], *, create_pr: bool = False
) -> set[str]:
    """Return the names of shards that a repository's storage does not hold (any more).

    Args:
        repo: the target.
        entries: the shards' rows of the journal.
        create_pr: whether they are for a pull request: without a branch, the right to read is
            enough to ask.

    Raises:
        StoppedError: the network or the Hub kept failing.
    """
    missing, rows = set(), list(entries)
    for start in range(0, len(rows), _BATCH):
        batch = rows[start : start + _BATCH]
        names = {str(entry["sha256"]): str(entry["name"]) for entry in batch}
        infos = [_info(entry) for entry in batch]

        def ask(infos: list[UploadInfo] = infos) -> list[dict[str, Any]]:
            actions, _, _ = post_lfs_batch_info(
                upload_infos=infos,
                token=None,  # within the headers
                repo_type="model",
                repo_id=repo.id,
                revision=None if create_pr else "main",
                endpoint=repo.api.endpoint,
                headers=repo.api._build_hf_headers(),
            )
            return actions

        answers = patiently(ask, what=f"ask what the storage of {repo.id} holds")
        missing |= {names[a["oid"]] for a in answers if a.get("actions") and a["oid"] in names}
    return missing


def deposited_file(entry: Mapping[str, Any], sample: bytes = b"") -> CommitOperationAdd:
    """Return what commits a shard that is in the storage; as `preupload_lfs_files` leaves it.

    Args:
        entry: its row of the journal: name, size and sha256.
        sample: its first bytes.
    """
    operation = CommitOperationAdd(str(entry["name"]), b"")
    operation.upload_info = _info(entry, sample)
    operation._upload_mode = "lfs"
    operation._should_ignore = False
    operation._is_uploaded = True
    return operation


def _info(entry: Mapping[str, Any], sample: bytes = b"") -> UploadInfo:
    sha256 = bytes.fromhex(str(entry["sha256"]))
    return UploadInfo(size=int(entry["size"]), sample=sample, sha256=sha256)
