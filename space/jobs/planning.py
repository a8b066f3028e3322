"""What visitors have read for them, plans and reports: in processes of their own, within limits."""

import json
import math
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from resmerge_stream.errors import RecipeError, Remedy, error_from_dict
from resmerge_stream.planning.request import Request

from ..asked import needs_account
from ..hardware import Hardware
from ..identity import Visitor, network_of
from ..settings import Settings
from .process import end, send, start_worker

_AT_A_TIME = 3
# Of one visitor and of all; more would only fill the server's threads. A network has half of all.
_MAY_WAIT, _ALL_WAIT = 4, 24
_REMEMBERED = 1000
# Who has used less than this lately may have the last free place.
_LIGHT_S, _HALF_FORGOTTEN_S = 3.0, 60.0


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
    """So many at a time, nobody more than one; who has used the fewest seconds lately comes first.

    The last place is for those who have used next to nothing, so that a few who ask for what takes
    long never hold all of them.

    Args:
        at_a_time: the limit.
        clock: seconds that only grow.
    """

    def __init__(self, at_a_time: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._at_a_time, self._clock = at_a_time, clock
        self._changed = threading.Condition()
        self._waiting: dict[object, str] = {}
        self._running: list[str] = []
        self._used: dict[str, tuple[float, float]] = {}  # seconds, as of when

    @contextmanager
    def turn(self, who: str) -> Iterator[None]:
        """Wait for somebody's turn, and keep it meanwhile.

        Raises:
            RecipeError: too many wait already, of this visitor or of all.
        """
        ticket, network = object(), network_of(who)
        with self._changed:
            mine = sum(waits == who for waits in self._waiting.values())
            near = sum(network_of(waits) == network for waits in self._waiting.values())
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
            self._changed.notify_all()
        began = self._clock()
        try:
            yield
        finally:
            with self._changed:
                self._running.remove(who)
                now = self._clock()
                used = self._lately(who) + now - began
                self._used.pop(network, None)  # the first of the table asked longest ago
                self._used[network] = used, now
                while len(self._used) > _REMEMBERED:
                    del self._used[next(iter(self._used))]
                self._changed.notify_all()

    def _lately(self, who: str) -> float:
        """Return the seconds that a visitor's network has used, half forgotten each minute."""
        used, then = self._used.get(network_of(who), (0.0, 0.0))
        return used * math.pow(0.5, (self._clock() - then) / _HALF_FORGOTTEN_S)

    def _next(self) -> object | None:
        free = self._at_a_time - len(self._running)
        if free < 1:
            return None
        waiting = [ticket for ticket, who in self._waiting.items() if who not in self._running]
        if free == 1 < self._at_a_time:
            waiting = [
                ticket for ticket in waiting if self._lately(self._waiting[ticket]) < _LIGHT_S
            ]
        return min(waiting, key=lambda ticket: self._lately(self._waiting[ticket]), default=None)


class Planners:
    """The processes that plan, and read reports. Every method may be called from any thread.

    Args:
        settings: limits and the folder.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._allowance = Allowance(settings.anonymous_plans)
        # The example needs no network and no time: it never waits behind what strangers ask for.
        self._turns, self._example_turns = Turns(_AT_A_TIME), Turns(1)
        # Nor for a process to start: it has one of its own.
        self._idle: dict[Turns, list[subprocess.Popen[str]]] = {
            self._turns: [], self._example_turns: [],
        }  # fmt: skip
        self._advice: dict[tuple[str, ...], dict[str, Any]] = {}
        self._lock = threading.Lock()
        self._closed = False

    def warm(self) -> None:
        """Start processes, so that the first visitor does not wait for them."""
        for turns in self._idle:
            self._put_back(turns, self._take(turns))

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
        request = {"asked": asked.to_dict(), "target": bool(visitor.token)}
        turns = self._turns if needs_account(asked) else self._example_turns
        plan: dict[str, Any] = self._answer("plan", request, visitor, address, turns)
        plan["hardware"] = [Hardware(**known) for known in plan["hardware"]]
        return plan

    def advice(self, asked: Request, visitor: Visitor, address: str) -> dict[str, Any]:
        """Return which methods to compare for built-in experts, as `Advice.to_dict`; read once.

        Args:
            asked: of built-in models alone.
            visitor, address: as for `plan`.

        Raises:
            ResMergeError: as `plan_merge`.
        """
        key = tuple(str(ref) for ref in asked.recipe.models)
        if key not in self._advice:
            request = {"asked": asked.to_dict()}
            found = self._answer("advice", request, visitor, address, self._example_turns)
            self._advice[key] = found
        return self._advice[key]

    def report(self, place: str, visitor: Visitor, address: str, *, name: str = "") -> Any:
        """Return the report of a merge as plain data, within the limits of `explore.report_of`.

        Args:
            place: a repository; with `name`, a file of one of this Space's own jobs.
            visitor: whose token reads.
            address: as for `plan`.
            name: what to call the file.

        Raises:
            ResMergeError: there is none, or it cannot be read here.
        """
        request = {"place": place, "name": name}
        return self._answer("report", request, visitor, address, self._turns)

    def recipe(self, place: str, visitor: Visitor, address: str) -> Any:
        """Return the recipe of a merged model on the Hub, as plain data.

        Args:
            place: of a repository: its id, or an address of it.
            visitor: whose token reads.
            address: as for `plan`.

        Raises:
            ResMergeError: there is none, or it names what is no repository.
        """
        return self._answer("recipe", {"place": place}, visitor, address, self._turns)

    def _answer(
        self, kind: str, request: dict[str, Any], visitor: Visitor, address: str, turns: Turns
    ) -> Any:
        who = f"@{visitor.name}" if visitor.name else address
        is_counted = not visitor.name and turns is self._turns
        if is_counted and not self._allowance.take(who):
            raise RecipeError(
                "too many plans without an account at the moment. Try again in a minute.",
                Remedy.SIGN_IN,
                kind="busy",
            )
        with turns.turn(who):
            answer = self._ask(
                {"kind": kind, "token": visitor.token_or_nobody, **request},
                turns,
                has_account=bool(visitor.name),
            )
        if "error" in answer:
            raise error_from_dict(answer)
        return answer[kind]

    def close(self) -> None:
        """End the processes that wait for work; those at work end with their pipes."""
        with self._lock:
            self._closed = True
            idle = [process for each in self._idle.values() for process in each]
            self._idle = {turns: [] for turns in self._idle}
        for process in idle:
            end(process)

    def _ask(self, request: dict[str, Any], turns: Turns, *, has_account: bool) -> dict[str, Any]:
        settings = self._settings
        limit = settings.plan_seconds if has_account else settings.anonymous_plan_seconds
        for _ in range(2):
            process, began = self._take(turns), time.monotonic()
            timer = threading.Timer(limit, process.kill)
            timer.start()
            send(process, request)
            line = process.stdout.readline() if process.stdout is not None else ""
            timer.cancel()
            if line:
                self._put_back(turns, process)
                answer: dict[str, Any] = json.loads(line)
                return answer
            end(process)
            if time.monotonic() - began > 1:
                break  # else it had ended while it was idle
        longer = () if has_account else (Remedy.SIGN_IN,)
        raise RecipeError(
            f"planning took more than {limit:.0f} s, or more memory than a plan may here: the Hub "
            "is slow, or these models have very many tensors. Try again, or plan on your machine.",
            *longer,
            kind="too-large",
        )

    def _take(self, turns: Turns) -> "subprocess.Popen[str]":
        with self._lock:
            while self._idle[turns]:
                process = self._idle[turns].pop()
                if process.poll() is None:
                    return process
                end(process)
        return start_worker(self._settings, "space.jobs.planner")

    def _put_back(self, turns: Turns, process: "subprocess.Popen[str]") -> None:
        with self._lock:
            if not self._closed:
                self._idle[turns].append(process)
                return
        end(process)
