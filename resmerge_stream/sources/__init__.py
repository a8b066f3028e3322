"""READ: open a checkpoint wherever it is, behind one protocol."""

import os
from pathlib import Path

from ..errors import CheckpointNotFoundError, shown
from ..recipe import ModelRef
from .checkpoint import Checkpoint, SourceFile, StoredTensor
from .local import LocalCheckpoint

__all__ = ["Checkpoint", "SourceFile", "StoredTensor", "open_checkpoint"]


def open_checkpoint(ref: ModelRef) -> Checkpoint:
    """Open the checkpoint that a reference names; reads headers and configs only.

    Args:
        ref: a folder on this machine. A name that exists as a folder is a folder.

    Raises:
        CheckpointNotFoundError: there is no such folder.
        CheckpointFormatError: a header, an index or a config is malformed.
        UnsupportedCheckpointError: the weights are not mergeable safetensors.
    """
    folder = Path(ref.id).expanduser()
    if not os.path.isdir(folder):
        raise CheckpointNotFoundError(
            f"there is no folder {shown(ref.id)}. Give the folder of a model: "
            "one with config.json and *.safetensors files."
        )
    return LocalCheckpoint.open(folder, ref)
