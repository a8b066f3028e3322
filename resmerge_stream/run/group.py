"""What the processes of one run tell each other, through torch.distributed's store."""

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Self

from ..errors import ResMergeError, StoppedError, error_from_dict
from ..sinks.sink import Turn

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

# A process that was not heard of for so long is gone, with its machine: on one machine the
# launcher sees a dead process at once.
SILENT_S = 120.0
_BEAT_S = 5.0
# Machines may start minutes after each other.
_CONNECT_S = 900.0
_POLL_S = 0.02
_SLOWEST_POLL_S = 0.2
# How long a process that failed waits for the main one to say so in its place.
_ANSWER_S = 20.0


class OthersStoppedError(StoppedError):
    """Another process of this run failed; the main process says why."""


def launched() -> tuple[int, int]:
    """Return this process's number and how many there are, as accelerate or torchrun say."""
    values = [os.environ.get(key, "") for key in ("RANK", "WORLD_SIZE", "MASTER_PORT")]
    if "MASTER_ADDR" not in os.environ or not all(value.isdigit() for value in values):
        return 0, 1
    return int(values[0]), int(values[1])


class Group:
    """One process's end of the store. Process 0 is the main one.

    Args:
        store: returns the store that all processes share; called in a thread, since finding the
            others takes as long as planning does.
        rank, size: which process this is, of how many.
        silent_s: seconds after which a process that is not heard of counts as gone.

    Attributes:
        is_over: whether this or another process failed, so that the run ends.
        is_ended: whether the launcher ended this process; `check` says so as often as it is asked.
        is_telling: whether the run stands still since an event is told; its end waits for `check`.

    Every wait ends with an error when another process fails or is gone.
    """

    def __init__(
        self, store: "Callable[[], Store]", rank: int, size: int, silent_s: float = SILENT_S
    ) -> None:
        self.rank, self.size = rank, size
        self.name = f"process {rank} ({socket.gethostname()})"
        self._store_of, self._opened = store, Future["Store"]()
        self._silent_s = silent_s
        self._heard: dict[int, tuple[bytes, float]] = {}
        self._looked = time.monotonic()
        self.is_over = self.is_ended = self.is_telling = False
        self._sent = 0
        self._received = dict.fromkeys(range(1, size), 0)
        self._closed = threading.Event()
        self._heart = threading.Thread(target=self._beat, daemon=True)

    def open(self) -> Self:
        """Start to be heard by the others; who needs the store waits for it."""
        self._heart.start()
        return self

    @classmethod
    def connect(cls) -> "Group":
        """Return the group that the launcher's environment tells of, open."""
        return cls(_store_of_launcher, *launched()).open()

    @property
    def _store(self) -> "Store":
        return self._opened.result()

    def put(self, key: str, value: Any) -> None:
        """Say something once, as JSON."""
        with _reaching():
            self._store.set(key, json.dumps(value))

    def look(self, key: str) -> Any | None:
        """Return what was said under a key, or None where nothing was said yet."""
        with _reaching():
            return json.loads(self._store.get(key)) if self._store.check([key]) else None

    def wait(self, key: str) -> Any:
        """Return what is said under a key, once it is.

        Raises:
            ResMergeError: another process failed, or is gone.
        """
        pause = _POLL_S
        while (value := self.look(key)) is None:
            self.check()
            time.sleep(pause)
            pause = min(1.5 * pause, _SLOWEST_POLL_S)
        return value

    def ticket(self) -> int:
        """Return the next number, from 0; no other process gets the same.

        Raises:
            ResMergeError: another process failed, or is gone.
        """
        self.check()
        with _reaching():
            return int(self._store.add("tickets", 1)) - 1

    @contextlib.contextmanager
    def turn(self) -> Iterator[Turn]:
        """Wait until no other process is inside, first come first served.

        Raises:
            ResMergeError: another process failed, or is gone.
        """
        with _reaching():
            mine = self._store.add("turns", 1)
        while True:
            with _reaching():
                if self._store.add("turns over", 0) == mine - 1:
                    break
            self.check()
            time.sleep(_POLL_S)
        turn = Turn(self.look("turn") or "")
        yield turn
        self.put("turn", turn.value)
        with _reaching():
            self._store.add("turns over", 1)

    def send(self, message: Any) -> None:
        """Send something to the main process.

        Raises:
            ResMergeError: another process failed, or is gone.
        """
        self.check()
        self.put(f"message/{self.rank}/{self._sent}", message)
        self._sent += 1

    def messages(self) -> Iterator[tuple[int, Any]]:
        """Yield what the others sent by now, and who did; for the main process."""
        for rank in self._received:
            while (
                message := self.look(key := f"message/{rank}/{self._received[rank]}")
            ) is not None:
                self._received[rank] += 1
                with _reaching():
                    self._store.delete_key(key)
                yield rank, message

    def check(self) -> None:
        """Raise when another process failed, or is gone.

        Raises:
            ResMergeError: what another process failed with, in the main process.
            OthersStoppedError: the same in every other process.
            StoppedError: the launcher ended this process.
        """
        if self.is_ended:
            raise StoppedError("the launcher ended this run: a process died, or it was told to.")
        found = self.look("failure")
        if found is not None and found["rank"] != self.rank:
            self.is_over = True
            if self.rank != 0:
                raise OthersStoppedError(f"{found['by']} ended this run.")
            self.put("answer", found["rank"])
            error = error_from_dict(found)
            raise type(error).of(notice.prefixed(found["by"]) for notice in error.notices)
        if self.rank == 0 and time.monotonic() - self._looked > _BEAT_S:
            self._look_for_silence()

    def fail(self, error: BaseException) -> bool:
        """Tell the others that this process ends; return whether the main one says why."""
        self.is_over = True
        with contextlib.suppress(StoppedError):
            if self.look("failure") is None:
                ours = error if isinstance(error, ResMergeError) else StoppedError(repr(error))
                self.put("failure", {"rank": self.rank, "by": self.name, **ours.to_dict()})
            if self.rank != 0:
                return self._is_answered()
            self.put("answer", 0)
        return self.rank != 0 and isinstance(error, OthersStoppedError)

    def stop_others(self, error: BaseException) -> None:
        """Tell the others why the main process ends, and wait a moment until they have ended."""
        self.fail(error)
        self._wait_for_others()

    def leave(self) -> None:
        """End together: the others stay until the main process is done, and that until they know.

        Should it be lost at the end, a launcher that starts it again needs all of them once more.

        Raises:
            ResMergeError: another process failed, or the main one is gone.
        """
        if self.rank != 0:
            self.wait("done")
        else:
            self.put("done", True)
            self._wait_for_others()

    def _wait_for_others(self) -> None:
        """Wait a moment until the other processes have ended."""
        until = time.monotonic() + _ANSWER_S
        with contextlib.suppress(StoppedError):
            for rank in range(1, self.size):
                while self.look(f"over/{rank}") is None and time.monotonic() < until:
                    time.sleep(_POLL_S)

    def close(self) -> None:
        """Say that this process is over."""
        with contextlib.suppress(StoppedError):
            self.put(f"over/{self.rank}", True)
        self._closed.set()
        self._heart.join(timeout=_BEAT_S)

    def _is_answered(self) -> bool:
        """Wait until the main process has seen a failure, or has failed itself."""
        until = time.monotonic() + _ANSWER_S
        while time.monotonic() < until:
            failure = self.look("failure") or {}
            if failure.get("rank") == 0 or self.look("answer") is not None:
                return True
            time.sleep(_POLL_S)
        return False

    def _beat(self) -> None:
        try:
            self._opened.set_result(self._store_of())
        except BaseException as exc:  # handed to whoever needs the store
            self._opened.set_exception(exc)
            return
        number = 0
        with contextlib.suppress(StoppedError):
            while True:
                self.put(f"beat/{self.rank}", number)
                number += 1
                if self._closed.wait(_BEAT_S):
                    return

    def _look_for_silence(self) -> None:
        now = self._looked = time.monotonic()
        for rank in range(1, self.size):
            with _reaching():
                key = f"beat/{rank}"
                beat = self._store.get(key) if self._store.check([key]) else b""
            last, since = self._heard.get(rank, (b"", now))
            if beat != last or rank not in self._heard:
                self._heard[rank] = (beat, now)
            elif now - since > (self._silent_s if beat else _CONNECT_S):
                raise StoppedError(
                    f"process {rank} was not heard of for {now - since:.0f} s: it or its machine "
                    "is gone."
                )


def _store_of_launcher() -> "Store":
    """Return the store of the run that begins.

    A machine that was lost and started again may come while the others still run without it. What
    they merge now nobody would put together: they are told to end, and this process waits for the
    run that they begin then.
    """
    from torch.distributed.rendezvous import rendezvous

    rank, _ = launched()
    with _reaching():
        while True:
            found = rendezvous("env://", timeout=timedelta(seconds=_CONNECT_S))
            store: Store = next(iter(found))[0]
            if store.add(f"started/{rank}", 1) == 1:
                return store
            _end_run(store, rank)


def _end_run(store: "Store", rank: int) -> None:
    """Tell the processes of a run that this one was started again, and wait until it is over."""
    error = StoppedError("its machine was lost, and has started again.")
    name = f"process {rank} ({socket.gethostname()})"
    if not store.check(["failure"]):
        store.set("failure", json.dumps({"rank": rank, "by": name, **error.to_dict()}))
    from torch.distributed import DistError

    with contextlib.suppress(DistError, OSError):
        while True:  # until its main process is gone, and the store with it
            store.check(["failure"])
            time.sleep(_SLOWEST_POLL_S)


@contextlib.contextmanager
def _reaching() -> Iterator[None]:
    """Translate what the store raises when it cannot be reached."""
    from torch.distributed import DistError

    try:
        yield
    except (DistError, OSError) as exc:
        raise StoppedError(
            "the other processes of this run cannot be reached: the main one ended, or the "
            "network between the machines failed."
        ) from exc
