"""Visitors' plans: in processes of their own, within limits, nobody before everybody else."""

import json
import subprocess
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from resmerge_stream.errors import RecipeError, Remedy, error_from_dict
from resmerge_stream.planning.request import Request

from ..asked import needs_account
from ..hardware import Fit
from ..identity import Visitor, network_of
from ..settings import Settings
from .process import end, send, start_worker

_AT_A_TIME = 3
# Of one visitor and of all; more would only fill the server's threads. A network has half of all.
_MAY_WAIT, _ALL_WAIT = 4, 24
_REMEMBERED = 1000


class Allowance:
    """How often a visitor may do something in a minute.

    Args:
        per_minute: the limit.
    """

    def __init__(self, per_minute: int) -> None:
        self._per_minute = per_minute
        self._times: dict[str, deque[float]] = {}
        self._lock = threading.Lock()

    def take(self, who: str = "") -> bool:
        """Return whether somebody may do it now, and count it if so."""
        now = time.monotonic()
        with self._lock:
            times = self._times.pop(who, deque())
            self._times[who] = times  # the last of the table: the first were not here for longest
            while len(self._times) > _REMEMBERED:
                del self._times[next(iter(self._times))]
            while times and now - times[0] > 60:
                times.popleft()
            if len(times) >= self._per_minute:
                return False
            times.append(now)
            return True


class Turns:
    """So many at a time, nobody more than one, and who was served longest ago comes first.

    Args:
        at_a_time: the limit.
    """

    def __init__(self, at_a_time: int) -> None:
        self._at_a_time = at_a_time
        self._changed = threading.Condition()
        self._waiting: dict[object, str] = {}
        self._running: list[str] = []
        self._served: dict[str, float] = {}

    @contextmanager
    def turn(self, who: str) -> Iterator[None]:
        """Wait for somebody's turn, and keep it meanwhile.

        Raises:
            RecipeError: too many wait already, of this visitor or of all.
        """
        ticket = object()
        with self._changed:
            mine = sum(waits == who for waits in self._waiting.values())
            near = sum(network_of(waits) == network_of(who) for waits in self._waiting.values())
            if mine >= _MAY_WAIT or near >= _ALL_WAIT // 2 or len(self._waiting) >= _ALL_WAIT:
                raise RecipeError(
                    "this Space is busy planning. Try again in a moment.", kind="busy"
                )
            self._waiting[ticket] = who
            try:
                self._changed.wait_for(lambda: self._next() is ticket)
            finally:
                del self._waiting[ticket]
            self._running.append(who)
            self._served.pop(who, None)
            self._served[who] = time.monotonic()
            while len(self._served) > _REMEMBERED:
                del self._served[next(iter(self._served))]
            self._changed.notify_all()
        try:
            yield
        finally:
            with self._changed:
                self._running.remove(who)
                self._changed.notify_all()

    def _next(self) -> object | None:
        if len(self._running) >= self._at_a_time:
            return None
        free = [ticket for ticket, who in self._waiting.items() if who not in self._running]
        return min(free, key=lambda t: self._served.get(self._waiting[t], 0.0), default=None)


class Planners:
    """The processes that plan. Every method may be called from any thread.

    Args:
        settings: limits and the folder.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._allowance = Allowance(settings.anonymous_plans)
        self._turns = Turns(_AT_A_TIME)
        self._idle: list[subprocess.Popen[str]] = []
        self._lock = threading.Lock()
        self._closed = False

    def warm(self) -> None:
        """Start a process, so that the first visitor does not wait for it."""
        self._put_back(self._take())

    def plan(self, asked: Request, visitor: Visitor, address: str) -> dict[str, Any]:
        """Return a plan as `Plan.to_dict` gives it, and beside it what the page shows of hardware.

        Args:
            asked: with ids that are checked.
            visitor: whose token reads; a target is only looked at for somebody signed in.
            address: where the visitor comes from, for those without an account.

        Raises:
            RecipeError: too many plans at the moment, or this one is larger than one may be here.
            ResMergeError: as `plan_merge`.
        """
        who = f"@{visitor.name}" if visitor.name else address
        is_counted = not visitor.name and needs_account(asked)
        if is_counted and not self._allowance.take(who):
            raise RecipeError(
                "too many plans without an account at the moment. Try again in a minute.",
                Remedy.SIGN_IN,
                kind="busy",
            )
        with self._turns.turn(who):
            answer = self._ask(
                {
                    "asked": asked.to_dict(),
                    "token": visitor.token_or_nobody,
                    "target": bool(visitor.token),
                }
            )
        if "error" in answer:
            raise error_from_dict(answer)
        found: dict[str, Any] = answer["plan"]
        found["hardware"] = [Fit.from_dict(fit) for fit in found["hardware"]]
        return found

    def close(self) -> None:
        """End the processes that wait for work; those at work end with their pipes."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
        for process in idle:
            end(process)

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        limit = self._settings.plan_seconds
        for _ in range(2):
            process, began = self._take(), time.monotonic()
            timer = threading.Timer(limit, process.kill)
            timer.start()
            send(process, request)
            line = process.stdout.readline() if process.stdout is not None else ""
            timer.cancel()
            if line:
                self._put_back(process)
                answer: dict[str, Any] = json.loads(line)
                return answer
            end(process)
            if time.monotonic() - began > 1:
                break  # else it had ended while it was idle
        raise RecipeError(
            f"planning took more than {limit:.0f} s, or more memory than a plan may here: the Hub "
            "is slow, or these models have very many tensors. Try again, or plan on your machine.",
            kind="too-large",
        )

    def _take(self) -> "subprocess.Popen[str]":
        with self._lock:
            while self._idle:
                process = self._idle.pop()
                if process.poll() is None:
                    return process
                end(process)
        return start_worker(self._settings, "space.jobs.planner")

    def _put_back(self, process: "subprocess.Popen[str]") -> None:
        with self._lock:
            if not self._closed:
                self._idle.append(process)
                return
        end(process)
