"""One plan, run by one process or by several: the same start, everybody's events, one end."""

import contextlib
import dataclasses
import hashlib
import json
import signal
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import FrameType
from typing import Any, TypeVar

from ..device import machine_share
from ..errors import PlanRefusedError, Remedy, StoppedError, listed
from ..planning.plan import Plan
from ..sinks.layout import Shard
from ..sinks.sink import Membership
from .events import Event, Progressed, ShardFinished, TensorMerged
from .group import Group, launched
from .progress import Progress
from .worklist import WorkList

T = TypeVar("T")
_TICK_S = 1.0
_POLL_S = 0.05


class ToldError(Exception):
    """This process ends without a word: the main one says why. `code` is what it returns."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


class Crew:
    """The processes that run one plan.

    Args:
        group: the other processes; None where there are none.
    """

    def __init__(self, group: Group | None = None) -> None:
        self._group = group
        self._tickets = iter(range(1 << 62))

    @property
    def size(self) -> int:
        """How many processes there are."""
        return self._group.size if self._group is not None else 1

    @property
    def is_main(self) -> bool:
        """Whether this is the process that plans for all, and finishes."""
        return self._group is None or self._group.rank == 0

    def shared(self, key: str, make: Callable[[], T]) -> T:
        """Return what `make` returns in the main process, JSON; the others wait for it."""
        if self._group is None:
            return make()
        if self.is_main:
            self._group.put(key, make())
        value: T = self._group.wait(key)
        return value

    @contextlib.contextmanager
    def main_first(self, key: str) -> Iterator[None]:
        """Have the others wait until the main process has left this."""
        if not self.is_main:
            self.shared(key, bool)
        yield
        if self.is_main:
            self.shared(key, lambda: True)

    def gathered(self, key: str, mine: Mapping[str, Any]) -> dict[str, Any]:
        """Return what all processes have, in the main process; its own in every other."""
        found = dict(mine)
        if self._group is not None and self.is_main:
            for rank in range(1, self.size):
                found = {**self._group.wait(f"{key}/{rank}"), **found}
        elif self._group is not None:
            self._group.put(f"{key}/{self._group.rank}", found)
        return found

    def stop_others(self, error: BaseException) -> None:
        """End the other processes, since what they do is of no use any more."""
        if self._group is not None:
            self._group.stop_others(error)

    def agree(self, plan: Plan) -> None:
        """Make sure that every process has the same plan.

        Raises:
            PlanRefusedError: this one has another plan than the main process.
            ResMergeError: another process has, or could not plan.
        """
        mine = _digest(plan)
        if self.shared("plan", lambda: mine) != mine:
            raise PlanRefusedError(
                "this process plans another merge than the main one: a branch moved in between, "
                "or this machine has other files. Name the commits (ID@COMMIT), give all machines "
                "the same folders.",
                Remedy.CONTINUE,
            )
        self.gathered("agreed", {})

    def membership(self) -> Membership:
        """Return as what this process opens the target of the run."""
        mark = self.shared("mark", lambda: uuid.uuid4().hex)
        if self._group is None:
            return Membership(mark)
        is_first = self.is_main or machine_share()[0] == 0
        return Membership(mark, self.is_main, is_first, self._group.turn)

    def work(self, plan: Plan, kept: Mapping[str, Any]) -> WorkList:
        """Return what this process is to merge.

        Args:
            plan: the plan.
            kept: the shards that need not be merged again, as the main process knows them.
        """
        names = set(
            self.shared("unmerged", lambda: [s.name for s in plan.shards if s.name not in kept])
        )
        unmerged = [shard for shard in plan.shards if shard.name in names]
        ticket = self._group.ticket if self._group is not None else self._tickets.__next__
        return WorkList(unmerged, ticket, self.size)

    def everyones(
        self, own: Iterator[Event], shards: Sequence[Shard], progress: Progress
    ) -> Iterator[Event]:
        """Yield this process's events; in the main process those of all, until all are done.

        Args:
            own: what happens here, until everything of this process is merged and sent.
            shards: of the plan, to say what is missing.
            progress: counts the whole run in the main process.

        Raises:
            StoppedError: a process stopped; in the main process it says what is missing.
        """
        if self._group is None:
            yield from own
        elif self.is_main:
            try:
                yield from self._lead(self._group, own, progress)
            except StoppedError as exc:
                missing = [shard.name for shard in shards if shard.name not in progress.files]
                left = f"missing: {listed(missing)}" if missing else "all are merged, not published"
                why = exc.notices[0]
                raise StoppedError(
                    f"{why.text} Finished shards are kept; {left}. Any number of processes can "
                    "continue.",
                    *dict.fromkeys((*why.remedies, Remedy.CONTINUE)),
                    **why.arguments,
                ) from exc
        else:
            for event in own:
                self._group.send([progress.peak_private, event.to_dict()])
                yield event
            self._group.send([progress.peak_private, None])

    def _lead(self, group: Group, own: Iterator[Event], progress: Progress) -> Iterator[Event]:
        busy = set(range(1, self.size))
        for event in own:
            yield event
            yield from self._news(group, progress, busy)
        ticked = time.monotonic()
        while busy:
            group.check()
            yield from self._news(group, progress, busy)
            if time.monotonic() - ticked > _TICK_S:
                ticked = time.monotonic()
                yield Progressed(**progress.now())
            time.sleep(_POLL_S)

    def _news(self, group: Group, progress: Progress, busy: set[int]) -> Iterator[Event]:
        """Yield what the others reported since the last time."""
        group.check()
        for rank, message in group.messages():
            peak, fields = message
            progress.peak_private = max(progress.peak_private, peak)
            if fields is None:
                busy.discard(rank)
                continue
            event = Event.from_dict(fields)
            if isinstance(event, Progressed):
                done = (event.bytes_read, event.bytes_written, event.bytes_sent)
                progress.others[rank] = done
                yield from _retold(event, progress)


def _retold(event: Progressed, progress: Progress) -> Iterator[Event]:
    """Yield another process's event as one of the whole run."""
    if isinstance(event, TensorMerged):
        progress.rows[event.tensor] = event.entry
        yield dataclasses.replace(event, **progress.now())
    elif isinstance(event, ShardFinished):
        file = {"name": event.shard, "size": event.bytes, "sha256": event.sha256}
        progress.files[event.shard] = file
        shards_done = len(progress.files)
        yield dataclasses.replace(event, **progress.now(), shards_done=shards_done)


@contextlib.contextmanager
def crew_of_launcher() -> Iterator[Crew]:
    """Give the processes that accelerate or torchrun started, or this one alone.

    Raises:
        ToldError: this process failed, and the main one says why.
    """
    if launched()[1] == 1:
        yield Crew()
        return
    group = Group.connect()
    try:
        with _ended_in_words(group):
            yield Crew(group)
    except BaseException as exc:
        if group.fail(exc):
            raise ToldError(getattr(exc, "exit_code", 1)) from exc
        raise
    finally:
        group.close()


@contextlib.contextmanager
def _ended_in_words(group: Group) -> Iterator[None]:
    """Have the main process say what is missing when the launcher ends it."""
    if group.rank != 0:
        yield
        return

    def stop(signum: int, frame: FrameType | None) -> None:
        if group.is_over:
            return  # a process that failed is ended with all others; why is being said already
        group.is_over = group.is_ended = True
        # Raised again later: an error in the middle of a finalizer is only printed.
        group.check()

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    except BaseException:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # this process is ending already
        raise
    signal.signal(signal.SIGTERM, before)


def _digest(plan: Plan) -> str:
    """Return a hash of all that decides about bytes; not of when a file was written."""
    sources = json.loads(json.dumps(plan.identity))
    for source in sources.values():
        for file in source.values():
            if isinstance(file, dict):
                file.pop("mtime_ns", None)
    headers = [hashlib.sha256(shard.header).hexdigest() for shard in plan.shards]
    text = json.dumps([plan.plan_hash, sources, headers], sort_keys=True)
    return hashlib.sha256(text.encode() + plan.config).hexdigest()
