"""READ: open a checkpoint wherever it is: one kind of model, whose bytes are in a store."""

import os
import re
from pathlib import Path

from ..errors import CheckpointNotFoundError, Remedy, StoppedError, shown
from ..recipe import BUCKETS, ModelRef
from .checkpoint import Checkpoint
from .local import open_file, open_folder
from .store import SourceFile, StoredTensor

__all__ = [
    "NO_FOLDER",
    "REPO_ID",
    "Checkpoint",
    "SourceFile",
    "StoredTensor",
    "open_checkpoint",
]

# Kind of the error that a name is neither a folder nor a repository.
NO_FOLDER = "no-folder"
# As the Hub takes them: no ".." or "--", no ".git" at the end.
REPO_ID = re.compile(
    r"(?!.*(?:\.\.|--|\.git$))[A-Za-z0-9][\w.\-]{0,95}/[A-Za-z0-9_][\w.\-]{0,95}", re.ASCII
)


def open_checkpoint(
    ref: ModelRef,
    *,
    token: str | bool | None = None,
    commit: str | None = None,
    max_header_bytes: int | None = None,
    hashes: bool = False,
) -> Checkpoint:
    """Open the checkpoint that a reference names; reads headers and configs only.

    Args:
        ref: a folder or a GGUF file on this machine, a repository, or a folder of a bucket. A name
            that exists as a folder is a folder.
        token: the caller's, for the Hub; None stands for HF_TOKEN or the login,
            False for nobody's.
        commit: what to read instead of the repository's revision.
        max_header_bytes: of indexes and headers of a repository; None: the format's limits only.
        hashes: whether a folder's weight files are hashed even if that takes long.

    Raises:
        CheckpointNotFoundError: there is no such folder or repository, or no access to it.
        CheckpointFormatError: a header, an index or a config is malformed.
        UnsupportedCheckpointError: the weights are not mergeable safetensors.
        SourceChangedError: a file of a bucket was replaced meanwhile.
        StoppedError: the network or the Hub kept failing.
    """
    folder = Path(os.path.expanduser(ref.id))
    if os.path.isdir(folder):
        return open_folder(folder, ref, hashes=hashes)
    if folder.suffix == ".gguf" and os.path.isfile(folder):
        return open_file(folder, ref, hashes=hashes)
    if (place := ref.in_bucket) is not None:
        from .bucket import open_bucket

        return open_bucket(ref.id, *place, token=token, max_header_bytes=max_header_bytes)
    if not REPO_ID.fullmatch(ref.id):
        raise CheckpointNotFoundError(
            f"there is no folder {shown(ref.id)}, and it is not a repository id either. Give the "
            "folder of a model (with config.json and *.safetensors), or namespace/name or "
            f"{BUCKETS}namespace/name/folder on the Hub.",
            kind=NO_FOLDER,
        )
    from ..hub.client import NoSuchRepositoryError
    from .hub import open_repository

    try:
        return open_repository(ref, token=token, commit=commit, max_header_bytes=max_header_bytes)
    except NoSuchRepositoryError as exc:
        # A mistyped folder looks like a repository id.
        raise CheckpointNotFoundError(exc.notices[0], Remedy.CHECK_FOLDER) from exc
    except StoppedError as exc:
        raise StoppedError(exc.notices[0], Remedy.CHECK_FOLDER) from exc
