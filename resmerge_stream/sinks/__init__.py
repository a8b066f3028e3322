"""WRITE: put finished shards where they belong, behind one protocol."""

from .folder import FolderSink, TargetState, target_state
from .sink import DroppingSink, ShardWriter, Sink

__all__ = ["DroppingSink", "FolderSink", "ShardWriter", "Sink", "TargetState", "target_state"]
