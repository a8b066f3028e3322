"""One plan, run by one process or by several: the same start, everybody's events, one end.

Tickets, events, failures and heartbeats need keys and a counter of torch's store, no collective
operation, so that no time limit of NCCL or gloo ends a process that merges a large tensor for
minutes. Commits go by turns: with parent commits alone two processes that stage 25 small shards
were slower than one (31 s against 24; by turns 19).
"""

import contextlib
import dataclasses
import hashlib
import json
import signal
import threading
import time
import uuid
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from types import FrameType
from typing import TYPE_CHECKING, Any, TypeVar

from ..device import machine_share
from ..errors import PlanRefusedError, RecipeError, Remedy, StoppedError, listed, system_errors
from ..planning.plan import Plan
from ..sinks.layout import Shard
from ..sinks.sink import Membership
from .events import Event, Progressed, ShardFinished, TensorMerged
from .group import Group, launched
from .progress import Progress

if TYPE_CHECKING:
    from .shards import Branch

T = TypeVar("T")
# Names the run that all parts of a plan are, which cannot tell each other a name.
PARTS_MARK = "parts"
_TICK_S = 1.0
_POLL_S = 0.05
Handler = Callable[[int, FrameType | None], Any] | int | signal.Handlers


class ToldError(Exception):
    """This process ends without a word: the main one says why. `code` is what it returns."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


class WorkList:
    """The shards of one process, in the order in which it takes them.

    Whoever is free takes the next shard, so that a slow process holds up nobody. What is taken
    ahead of the merge, so that its bytes are on their way, is taken from the others: the more
    shards are left, the more may be taken ahead, and one at the end.

    Args:
        shards: what is left to merge, the same in every process.
        ticket: returns the next number from 0 up, each to one process only.
        processes: how many take from the list.
    """

    def __init__(
        self, shards: Sequence[Shard], ticket: Callable[[], int], processes: int = 1
    ) -> None:
        self._shards, self._ticket, self._processes = shards, ticket, processes
        self._taken: list[Shard] = []
        self._begun = 0
        self._left = len(shards)
        self._lock = threading.Lock()

    def __iter__(self) -> Iterator[Shard]:
        """Yield what this process merges, until nothing is left."""
        while True:
            with self._lock:
                if self._begun == len(self._taken) and not self._take():
                    return
                shard = self._taken[self._begun]
                self._begun += 1
            yield shard

    def ahead(self) -> Iterator[Shard | None]:
        """Yield the same shards before they are merged; None where no more may be taken yet.

        It begins with the one that is being merged.
        """
        with self._lock:
            seen = max(self._begun - 1, 0)
        while True:
            with self._lock:
                waiting = len(self._taken) - self._begun
                may_take = waiting < max(1, self._left // (2 * self._processes))
                if seen == len(self._taken) and self._left and (may_take or self._processes == 1):
                    self._take()
                known = self._taken[seen] if seen < len(self._taken) else None
                over = known is None and not self._left
            if over:
                return
            seen += known is not None
            yield known

    def _take(self) -> bool:
        if not self._left:
            return False
        number = self._ticket()
        self._left = max(len(self._shards) - number - 1, 0)
        if number >= len(self._shards):
            return False
        self._taken.append(self._shards[number])
        return True


class Processes:
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
        if plan.own is not None and self.size > 1:
            raise RecipeError(
                "launched processes share the shards by themselves. Start each part in one "
                "process, or leave the part away.",
                field="part",
            )
        # All that decides about bytes; not when a file was written.
        sources = json.loads(json.dumps(plan.identity))
        for source in sources.values():
            for file in source.values():
                if isinstance(file, dict):
                    file.pop("mtime_ns", None)
        headers = [hashlib.sha256(shard.header).hexdigest() for shard in plan.shards]
        text = json.dumps([plan.plan_hash, sources, headers], sort_keys=True)
        mine = hashlib.sha256(text.encode() + plan.config).hexdigest()
        if self.shared("plan", lambda: mine) != mine:
            raise PlanRefusedError(
                "this process plans another merge than the main one: a branch moved in between, "
                "or this machine has other files. Name the commits (ID@COMMIT), give all machines "
                "the same folders.",
                Remedy.CONTINUE,
            )
        self.gathered("agreed", {})

    def membership(self, plan: Plan) -> Membership:
        """Return as what this process opens the target of the run."""
        if plan.own is not None:
            return Membership(PARTS_MARK, own=plan.own)
        mark = self.shared("mark", lambda: uuid.uuid4().hex)
        if self._group is None:
            return Membership(mark)
        is_first = self.is_main or machine_share()[0] == 0
        return Membership(mark, self.is_main, is_first, self._group.turn)

    def work(self, plan: Plan, kept: Container[str]) -> WorkList:
        """Return what this process is to merge.

        Args:
            plan: the plan.
            kept: the shards that need not be merged again, as the main process knows them.
        """
        names = set(
            self.shared("unmerged", lambda: [s.name for s in plan.shards if s.name not in kept])
        )
        names &= names if plan.own is None else set(plan.own)
        unmerged = [shard for shard in plan.shards if shard.name in names]
        ticket = self._group.ticket if self._group is not None else self._tickets.__next__
        return WorkList(unmerged, ticket, self.size)

    def everyones(
        self, own: Iterator[Event], branch: "Branch", progress: Progress
    ) -> Iterator[Event]:
        """Yield this process's events; in the main process those of all, until all are done.

        Args:
            own: what happens here, until everything of this process is merged and sent.
            branch: of the run; gets the others' rows and files in the main process.
            progress: counts the whole run there.

        Raises:
            StoppedError: a process stopped; in the main process it says what is missing.
        """
        if self._group is None:
            yield from own
        elif self.is_main:
            try:
                for event in self._lead(self._group, own, branch, progress):
                    # An end that came while the event is told would not pass by here.
                    self._group.is_telling = True
                    yield event
                    self._group.is_telling = False
                    self._group.check()
            except StoppedError as exc:
                missing = [s.name for s in branch.plan.shards if s.name not in branch.files]
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
                self._group.send([progress.peak.bytes, event.to_dict()])
                yield event
            self._group.send([progress.peak.bytes, None])

    def _lead(
        self, group: Group, own: Iterator[Event], branch: "Branch", progress: Progress
    ) -> Iterator[Event]:
        busy = set(range(1, self.size))
        for event in own:
            yield event
            yield from self._news(group, branch, progress, busy)
        ticked = time.monotonic()
        while busy:
            group.check()
            yield from self._news(group, branch, progress, busy)
            if time.monotonic() - ticked > _TICK_S:
                ticked = time.monotonic()
                yield Progressed(**progress.now())
            time.sleep(_POLL_S)

    def _news(
        self, group: Group, branch: "Branch", progress: Progress, busy: set[int]
    ) -> Iterator[Event]:
        """Yield what the others reported since the last time."""
        group.check()
        for rank, message in group.messages():
            peak, fields = message
            progress.peak.bytes = max(progress.peak.bytes, peak)
            if fields is None:
                busy.discard(rank)
                continue
            event = Event.from_dict(fields)
            if isinstance(event, Progressed):
                done = (event.bytes_read, event.bytes_written, event.bytes_sent)
                progress.others[rank] = done
            if isinstance(event, TensorMerged):  # told again as one of the whole run
                branch.rows[event.tensor] = event.entry
                yield dataclasses.replace(event, **progress.now())
            elif isinstance(event, ShardFinished):
                file = {"name": event.shard, "size": event.bytes, "sha256": event.sha256}
                branch.files[event.shard] = file
                shards_done = len(branch.files)
                yield dataclasses.replace(event, **progress.now(), shards_done=shards_done)


@contextlib.contextmanager
def launched_processes() -> Iterator[Processes]:
    """Give the processes that accelerate or torchrun started, or this one alone.

    Raises:
        ToldError: this process failed, and the main one says why.
    """
    if launched()[1] == 1:
        yield Processes()
        return
    group = Group.connect()
    try:
        with _ended_in_words(group), system_errors():
            yield Processes(group)
            group.leave()
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
        if not group.is_telling:
            group.check()

    before = at_end(stop)
    try:
        yield
    except BaseException:
        at_end(signal.SIG_IGN)  # this process is ending already
        raise
    restore(before)


def at_end(handler: Handler) -> dict[signal.Signals, Handler | None]:
    """Call a handler at each signal that ends, but for one that is ignored, as behind nohup.

    Returns:
        what was called before, for `restore`.
    """
    before = {one: signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGHUP)}
    for one, was in before.items():
        if was is not signal.SIG_IGN:
            signal.signal(one, handler)
    return before


def restore(handlers: Mapping[signal.Signals, Handler | None]) -> None:
    """Call what was called before `at_end`."""
    for one, was in handlers.items():
        if was is not None:  # not set by Python
            signal.signal(one, was)
