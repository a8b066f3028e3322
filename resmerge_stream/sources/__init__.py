"""READ: open a checkpoint wherever it is, behind one protocol."""

import os
import re
from pathlib import Path

from ..errors import CheckpointNotFoundError, Remedy, shown
from ..recipe import ModelRef
from .checkpoint import Checkpoint, SourceFile, StoredTensor
from .local import LocalCheckpoint

__all__ = ["REPO_ID", "Checkpoint", "SourceFile", "StoredTensor", "open_checkpoint"]

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
) -> Checkpoint:
    """Open the checkpoint that a reference names; reads headers and configs only.

    Args:
        ref: a folder on this machine, or a repository. A name that exists as a folder is a folder.
        token: the caller's, for the Hub; None stands for HF_TOKEN or the login,
            False for nobody's.
        commit: what to read instead of the repository's revision.
        max_header_bytes: of indexes and headers of a repository; None: the format's limits only.

    Raises:
        CheckpointNotFoundError: there is no such folder or repository, or no access to it.
        CheckpointFormatError: a header, an index or a config is malformed.
        UnsupportedCheckpointError: the weights are not mergeable safetensors.
        StoppedError: the network or the Hub kept failing.
    """
    folder = Path(os.path.expanduser(ref.id))
    if os.path.isdir(folder):
        return LocalCheckpoint.open(folder, ref)
    if not REPO_ID.fullmatch(ref.id):
        raise CheckpointNotFoundError(
            f"there is no folder {shown(ref.id)}, and it is not a repository id either. Give the "
            "folder of a model (with config.json and *.safetensors), or namespace/name on the Hub."
        )
    from ..hub.client import NoSuchRepositoryError
    from .hub import HubCheckpoint

    try:
        return HubCheckpoint.open(
            ref, token=token, commit=commit, max_header_bytes=max_header_bytes
        )
    except NoSuchRepositoryError as exc:
        # A mistyped folder looks like a repository id.
        raise CheckpointNotFoundError(exc.notices[0], Remedy.CHECK_FOLDER) from exc
