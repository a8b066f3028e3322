"""What goes wrong on demand: which requests a fault strikes, how often, what it does to them."""

import random
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from threading import Event, Lock

_FULL = "Private repository storage limit reached, please upgrade your plan to increase it."
_STALE = "A commit has happened since. Please refresh and try again."


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """Answer with this status in place of handling the request (with `after`: of its answer).

    With `page`, the body is that HTML, as a proxy or a login page on the way answers.
    """

    status: int
    message: str = "A fault on demand."
    code: str | None = None
    page: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Reset:
    """Reset the connection (RST) once `received` bytes of the request's body have arrived."""

    received: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """Promise the whole body, send this fraction of it, and close the connection."""

    fraction: float = 0.5


@dataclass(frozen=True, slots=True)
class IgnoreRange:
    """Handle the request as if it had no Range header: 200 and the whole file."""


@dataclass(frozen=True, slots=True)
class WrongRange:
    """Answer 206 with the right number of bytes and a Content-Range that is one byte off."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Delay:
    """Wait before handling the request."""

    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Hook:
    """Call a function before the request is handled (or after it, with `after`)."""

    call: Callable[[], object]


@dataclass(frozen=True, slots=True, kw_only=True)
class Flip:
    """Send a file's body with some bits flipped: those set in `bits`, from a position on.

    It strikes only requests that ask for that position.
    """

    position: int
    bits: bytes = b"\1"


@dataclass(frozen=True, slots=True, kw_only=True)
class Trickle:
    """Send the body at this many bytes a second, in pieces of a tenth of that."""

    rate: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Hold:
    """Take the whole request, and handle it only when the event is set, client or no client."""

    until: Event


Action = Answer | Reset | Cut | IgnoreRange | WrongRange | Delay | Hook | Flip | Trickle | Hold


def rate_limited(seconds: int = 1, *, bucket: str = "resolvers") -> Answer:
    """A 429 with the Hub's headers, to be retried after some seconds."""
    headers = {
        "RateLimit": f'"{bucket}";r=0;t={seconds}',
        "RateLimit-Policy": f'"fixed window";"{bucket}";q=3000;w=300',
        "Retry-After": str(seconds),
    }
    return Answer(status=429, message="Too many requests", headers=headers)


FAULTS: Mapping[str, Action] = {
    "429": rate_limited(0),
    "500": Answer(status=500, message="Internal server error"),
    "502": Answer(status=502, message="Bad gateway"),
    "503": Answer(status=503, message="Service unavailable"),
    "416": Answer(status=416, message="Range not satisfiable"),
    "forbidden": Answer(status=403, message="You lack the permission"),
    "expired": Answer(status=403, message="Request has expired"),
    "revoked": Answer(status=401, message="Invalid credentials in Authorization header"),
    "quota": Answer(status=403, message=_FULL),
    "stale": Answer(status=412, message=_STALE),
    "html": Answer(status=200, page="<html>Sign in to this network</html>"),
    "ignore-range": IgnoreRange(),
    "wrong-range": WrongRange(),
    "cut": Cut(),
    "reset": Reset(),
}
"""The faults that have a name."""


@dataclass(slots=True, kw_only=True)
class Rule:
    """One fault with the requests that it strikes.

    Attributes:
        method, path: regular expressions; the path is matched percent-encoded, with its query.
        port: `api`, `cdn`, or None for both.
        times: how many requests it strikes at most.
        seconds: for how long it strikes, from its first strike on: an outage.
        skip: how many matching requests it lets pass first.
        chance: probability of striking a matching request.
        after: strike when the request has been handled: its effect stays, its answer is lost.
        hits: how many it has struck.
    """

    name: str
    action: Action
    method: str | None = None
    path: str | None = None
    port: str | None = None
    times: int | None = None
    seconds: float | None = None
    skip: int = 0
    chance: float = 1.0
    after: bool = False
    hits: int = 0
    began: float | None = None

    def matches(self, method: str, path: str, port: str, asked: str = "") -> bool:
        """Whether a request is of the kind that this rule strikes; `asked` is its Range header."""
        if isinstance(self.action, Flip) and (bounds := re.fullmatch(r"bytes=(\d+)-(\d*)", asked)):
            first, last = int(bounds[1]), int(bounds[2] or 1 << 62)
            if not first <= self.action.position <= last:
                return False
        return (
            (self.port is None or self.port == port)
            and (self.method is None or re.fullmatch(self.method, method) is not None)
            and (self.path is None or re.search(self.path, path) is not None)
        )


class Faults:
    """The rules in force; any number of them may strike one request."""

    def __init__(self, seed: int = 0) -> None:
        self._rules: list[Rule] = []
        self._random = random.Random(seed)
        self._lock = Lock()

    def seed(self, seed: int) -> None:
        """Make the draws of `chance` repeatable from here on."""
        self._random.seed(seed)

    def add(
        self,
        fault: str | Action,
        *,
        method: str | None = None,
        path: str | None = None,
        port: str | None = None,
        times: int | None = None,
        seconds: float | None = None,
        skip: int = 0,
        chance: float = 1.0,
        after: bool = False,
    ) -> Rule:
        """Add a rule and return it; see `Rule` for the arguments and `FAULTS` for the names."""
        name = fault if isinstance(fault, str) else type(fault).__name__.lower()
        action = FAULTS[fault] if isinstance(fault, str) else fault
        rule = Rule(
            name=name,
            action=action,
            method=method,
            path=path,
            port=port,
            times=times,
            seconds=seconds,
            skip=skip,
            chance=chance,
            after=after,
        )
        with self._lock:
            self._rules.append(rule)
        return rule

    def remove(self, rule: Rule) -> None:
        """Take one rule out of force."""
        with self._lock:
            self._rules.remove(rule)

    def clear(self) -> None:
        """Take all rules out of force."""
        with self._lock:
            self._rules.clear()

    def strike(self, method: str, path: str, port: str, asked: str = "") -> tuple[Rule, ...]:
        """The rules that strike this request; counts and draws happen here, once a request."""
        with self._lock:
            return tuple(
                rule
                for rule in self._rules
                if rule.matches(method, path, port, asked) and self._falls(rule)
            )

    def _falls(self, rule: Rule) -> bool:
        if rule.skip > 0:
            rule.skip -= 1
            return False
        if rule.times is not None and rule.hits >= rule.times:
            return False
        now = time.monotonic()
        if rule.seconds is not None and rule.began is not None and now > rule.began + rule.seconds:
            return False
        if rule.chance < 1.0 and self._random.random() >= rule.chance:
            return False
        rule.hits += 1
        rule.began = now if rule.began is None else rule.began
        return True
