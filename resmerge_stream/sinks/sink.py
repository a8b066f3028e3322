"""What every target offers: shards written in order, then published all at once."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ..errors import StoppedError
from .layout import Shard


@dataclass(slots=True)
class Turn:
    """What only one process of a run does at a time.

    Attributes:
        value: what the process before left for the next one; to be changed.
    """

    value: str = ""


@dataclass(frozen=True, slots=True)
class Membership:
    """As what a process opens the target of a run.

    Attributes:
        mark: names the run, the same in all its processes.
        is_main: whether it sets the target up and publishes; the others join.
        is_first: whether it is the first on its machine, and sends what earlier runs left there.
        turn: waits until no other process of the run is inside.
        own: names of the shards that this run makes, where others that it cannot reach make the
            rest under the same mark; None where there are no such runs.
    """

    mark: str = ""
    is_main: bool = True
    is_first: bool = True
    turn: Callable[[], AbstractContextManager[Turn]] = lambda: nullcontext(Turn())
    own: Collection[str] | None = None


class ShardWriter(Protocol):
    """One shard being written, front to back."""

    def write(self, data: memoryview) -> None:
        """Append bytes.

        Raises:
            StoppedError: no space, no permission, or the target is gone.
        """
        ...

    def finish(self) -> str:
        """Make the shard durable and return its sha256 in hex."""
        ...

    def abort(self) -> None:
        """Give up an unfinished shard; finished ones are kept."""
        ...


class Sink(ABC):
    """A folder or a repository that a merge ends in. What is not defined: nothing is to be done.

    Attributes:
        bytes_sent: to the Hub by this run, so far.
        bytes_to_send: to the Hub by this run, in all.
    """

    @property
    def bytes_sent(self) -> int:
        """Bytes of weights that this run has sent to the Hub so far."""
        return 0

    @property
    def bytes_to_send(self) -> int:
        """Bytes of weights that this run sends to the Hub in all."""
        return 0

    def finished_shards(self) -> Mapping[str, dict[str, Any]]:
        """Return the journal's entry of every shard that an earlier run finished, by name."""
        return {}

    def by_now(self) -> Mapping[str, dict[str, Any]]:
        """Return the entries of all shards that any run finished by now, by name.

        Raises:
            StoppedError: the Hub kept failing, or the target is another run's by now.
        """
        return self.finished_shards()

    def make_room(self, shard: Shard) -> None:
        """Wait until there is room for a shard; returns early when the sink is closed.

        Raises:
            StoppedError: what was to make the room failed.
        """

    @abstractmethod
    def open_shard(self, shard: Shard) -> ShardWriter:
        """Start a shard for which there is room; its header is written at once."""

    def keep(self, shard: Shard, entry: Mapping[str, Any]) -> None:
        """Record a finished shard in the journal, so that a later run need not make it again."""

    def settle(self) -> None:
        """Wait until every shard is where it has to be; returns early when the sink is closed.

        Raises:
            StoppedError: the Hub kept failing.
        """

    def lost(self, files: Iterable[Mapping[str, Any]]) -> list[str]:
        """Return the names of settled shards that are not there as they were finished.

        Args:
            files: name, size and sha256 of every shard.

        Raises:
            StoppedError: the Hub kept failing.
        """
        return []

    @abstractmethod
    def publish(self, files: Mapping[str, bytes]) -> str:
        """Make everything visible under its final name, the index last; return where it is.

        Args:
            files: the small files by name, sub-folders allowed.
        """

    def abandon(self) -> None:
        """Remove what this run left so far, since it can never be finished."""

    def close(self) -> None:
        """Release locks and files."""


class _Dropped:
    """A shard that is not kept. See `ShardWriter`."""

    def write(self, data: memoryview) -> None:
        """Drop the bytes."""

    def finish(self) -> str:
        """Return an empty hash: nothing was written."""
        return ""

    def abort(self) -> None:
        """Do nothing."""


class DroppingSink(Sink):
    """No weights at all: the tensors are dropped, and the report kept where it is wanted.

    Args:
        path: of the report, replaced when it exists; None keeps none.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._path = path

    def open_shard(self, shard: Shard) -> ShardWriter:
        """Return a writer that drops the bytes."""
        return _Dropped()

    def publish(self, files: Mapping[str, bytes]) -> str:
        """Write the only file given.

        Raises:
            StoppedError: it cannot be written.
        """
        if self._path is None:
            return ""
        (data,) = files.values()
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._path.write_bytes(data)
        except OSError as exc:
            raise StoppedError(f"cannot write {str(self._path)!r}: {exc.strerror}.") from exc
        return str(self._path)
