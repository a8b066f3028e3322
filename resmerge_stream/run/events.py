"""What a run reports, in order: planned, (counted,) tensors and shards, published, finished.

A part of a merge that others have yet to finish ends with that, published and finished left out.

Between any two of them, once a second: progress.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Base of all events; `name` is the value of ``"event"`` in ``merge --json``."""

    name: ClassVar[str] = "event"

    def to_dict(self) -> dict[str, Any]:
        """Return the event as plain data."""
        return {"event": self.name, **dataclasses.asdict(self)}

    @staticmethod
    def from_dict(stored: Mapping[str, Any]) -> "Event | None":
        """Return the event that `to_dict` wrote, or None: it is none of these.

        Args:
            stored: may hold more than the event, as a process adds what it knows of itself.
        """
        kind = _KINDS.get(str(stored.get("event")))
        if kind is None:
            return None
        known = {field.name for field in dataclasses.fields(kind)}
        return kind(**{key: value for key, value in stored.items() if key in known})


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned(Event):
    """The run starts; everything before was planning.

    Attributes:
        plan: as `Plan.to_dict`.
    """

    name: ClassVar[str] = "planned"
    plan: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Counted(Event):
    """A tensor was read in a counting pass, before the merge.

    Attributes:
        tensor: its name.
        number, passes: which pass, from 1.
        bytes_read: of all counting so far.
    """

    name: ClassVar[str] = "counted"
    tensor: str
    number: int
    passes: int
    bytes_read: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Analysed(Event):
    """A tensor was analysed; nothing is written for it.

    Attributes:
        tensor: its name.
        bytes_read: of this run so far.
    """

    name: ClassVar[str] = "analysed"
    tensor: str
    bytes_read: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Progressed(Event):
    """How far a run is; also sent by itself, once a second while nothing else is to be told.

    Attributes:
        bytes_read, bytes_written, bytes_sent: of this run so far; sent means to the Hub.
        read_speed, write_speed, sent_speed: the same a second, over the last ten seconds.
        seconds: since the run started.
        seconds_left: until everything is merged and sent, at the mean speed so far; None as long
            as there is nothing to tell it from.
        waiting: why nothing comes from the Hub, and until when; None where it works.
    """

    name: ClassVar[str] = "progress"
    bytes_read: int = 0
    bytes_written: int = 0
    bytes_sent: int = 0
    read_speed: float = 0.0
    write_speed: float = 0.0
    sent_speed: float = 0.0
    seconds: float = 0.0
    seconds_left: float | None = None
    waiting: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorMerged(Progressed):
    """A tensor was merged, cast and handed to the writer.

    Attributes:
        tensor: its name.
        rule: the rule that was applied.
        entry: its row of the report.
    """

    name: ClassVar[str] = "tensor"
    tensor: str
    rule: str
    entry: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardFinished(Progressed):
    """A shard is durable under its temporary name, or was so before this run.

    Attributes:
        shard: its final file name.
        bytes: its size.
        sha256: in hex.
        resumed: whether an earlier run made it.
        shards_done, shards: progress.
    """

    name: ClassVar[str] = "shard"
    shard: str
    bytes: int
    sha256: str
    resumed: bool
    shards_done: int
    shards: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Published(Event):
    """Everything is visible under its final name.

    Attributes:
        where: folder or URL.
    """

    name: ClassVar[str] = "published"
    where: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished(Event):
    """The last event of a run that went well.

    Attributes:
        where: folder or URL.
        report: the content of ``report.json``.
        already_there: whether an earlier run had finished it, so that nothing was done.
    """

    name: ClassVar[str] = "finished"
    where: str
    report: Mapping[str, Any]
    already_there: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class PartFinished(Event):
    """The last event of a part of a merge that other parts have yet to finish.

    Attributes:
        part: which, as `planning.parts.Part` is written.
        shards: names of those that were this part's.
        missing: names of those that no part has finished yet; empty: all are there, and the run
            that only publishes is to come.
    """

    name: ClassVar[str] = "part"
    part: str
    shards: Sequence[str]
    missing: Sequence[str]


_KINDS: dict[str, type[Event]] = {
    kind.name: kind
    for kind in (
        Planned, Counted, Analysed, Progressed, TensorMerged, ShardFinished, Published, Finished,
        PartFinished,
    )
}  # fmt: skip
