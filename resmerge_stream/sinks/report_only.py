"""No weights at all: a sink that keeps the report and drops the tensors."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..errors import StoppedError
from .layout import Shard


class _Dropped:
    """A shard that is not kept. See `ShardWriter`."""

    def write(self, data: memoryview) -> None:
        """Drop the bytes."""

    def finish(self) -> str:
        """Return an empty hash: nothing was written."""
        return ""

    def abort(self) -> None:
        """Do nothing."""


class ReportOnlySink:
    """Keeps one file, the report. See `Sink`.

    Args:
        path: of the report; replaced when it exists.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def finished_shards(self) -> Mapping[str, dict[str, Any]]:
        """Return nothing: nothing is resumed."""
        return {}

    def make_room(self, shard: Shard) -> None:
        """Nothing to wait for."""

    def settle(self) -> None:
        """Nothing to wait for."""

    def lost(self, files: Iterable[Mapping[str, Any]]) -> list[str]:
        """Return nothing: nothing is kept that could be lost."""
        return []

    def open_shard(self, shard: Shard) -> _Dropped:
        """Return a writer that drops the bytes."""
        return _Dropped()

    def keep(self, shard: Shard, entry: Mapping[str, Any]) -> None:
        """Keep nothing."""

    def publish(self, files: Mapping[str, bytes]) -> str:
        """Write the only file given.

        Raises:
            StoppedError: it cannot be written.
        """
        (data,) = files.values()
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._path.write_bytes(data)
        except OSError as exc:
            raise StoppedError(f"cannot write {str(self._path)!r}: {exc.strerror}.") from exc
        return str(self._path)

    @property
    def bytes_sent(self) -> int:
        """Nothing goes to the Hub."""
        return 0

    @property
    def bytes_to_send(self) -> int:
        """Nothing goes to the Hub."""
        return 0

    def abandon(self) -> None:
        """Nothing was left."""

    def close(self) -> None:
        """Nothing is open."""
