"""Who a visitor is and which token stands for them; the Space's own token is no visitor's."""

import hashlib
import ipaddress
import os
import re
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from resmerge_stream.errors import PublishError, Remedy, ResMergeError

LOOPBACK = ("127.0.0.1", "localhost", "::1")
_REMEMBERED_S, _REFUSED_S = 300.0, 60.0
# What a header can carry; a token of anything else is refused before anything is asked.
_TOKEN = re.compile(r"[!-~]{1,1000}")


@dataclass(frozen=True, slots=True)
class Visitor:
    """Somebody who asks.

    Attributes:
        name: the account's, or empty.
        token: of the account.
        orgs: organisations that the account may publish to.
        reading: the token to read with where there is no account, for a private Space.
        expires_at: when the token ends, seconds since 1970, where that is known.
    """

    name: str = ""
    token: str | None = field(default=None, repr=False)
    orgs: tuple[str, ...] = ()
    reading: str | None = field(default=None, repr=False)
    expires_at: float | None = None

    @property
    def token_or_nobody(self) -> str | bool:
        """What to read the Hub with: False is nobody's token, never the machine's own."""
        return self.token or self.reading or False


class _Answer:
    """What the Hub said, or is about to say, of one token.

    Args:
        asked_at: when, in seconds of `time.monotonic`.
    """

    def __init__(self, asked_at: float) -> None:
        self.found: Future[Visitor] = Future()
        self._asked_at = asked_at

    def settle(self, ask: Callable[[], Visitor]) -> None:
        """Ask, and let everybody who waits have the answer."""
        try:
            self.found.set_result(ask())
        except BaseException as exc:
            self.found.set_exception(exc)

    def is_stale(self, now: float) -> bool:
        """Whether it is to be asked for again; an outage is not remembered."""
        if not self.found.done():
            return False
        error = self.found.exception()
        if error is None:
            return now - self._asked_at > _REMEMBERED_S
        return not isinstance(error, PublishError) or now - self._asked_at > _REFUSED_S


class Visitors:
    """Looks up accounts, each once, and remembers them for some minutes.

    Args:
        whoami: asks the Hub whose token this is; for tests without one.
    """

    def __init__(self, whoami: Callable[[str], Visitor] | None = None) -> None:
        self._ask = whoami or _ask_hub
        self._known: dict[str, _Answer] = {}
        self._lock = threading.Lock()

    def who(self, token: str | None) -> Visitor:
        """Return whose token it is; without one, nobody, or the owner on their own machine.

        Raises:
            PublishError: the Hub does not accept the token, or it can be none.
            StoppedError: the Hub cannot be asked.
        """
        if token:
            if not _TOKEN.fullmatch(token):
                raise PublishError(
                    "this is not a token of the Hub.", Remedy.SIGN_IN_AGAIN, kind="bad-token"
                )
            return self._look_up(token)
        own = _own_token()
        if own is None:
            return Visitor()
        if not on_space():
            return self._look_up(own)
        return Visitor(reading=own) if self._is_private_space(own) else Visitor()

    def who_or_nobody(self, token: str | None) -> Visitor:
        """Return whose token it is, and nobody where that cannot be found out."""
        try:
            return self.who(token)
        except ResMergeError:
            return Visitor()

    def _look_up(self, token: str) -> Visitor:
        return self._remembered(token, lambda: self._ask(token))

    def _is_private_space(self, token: str) -> bool:
        def ask() -> Visitor:
            from resmerge_stream.hub.client import FAILURES, client

            try:
                info = client(token).space_info(os.environ["SPACE_ID"], timeout=20)
            except FAILURES:
                return Visitor()  # not known to be private: the secret stays unused
            return Visitor(name="private" if info.private is True else "")

        return bool(self._remembered(f"space {token}", ask).name)

    def _remembered(self, key: str, ask: Callable[[], Visitor]) -> Visitor:
        # Never a token as a key: who dumps this table learns nothing.
        digest, now = hashlib.sha256(key.encode()).hexdigest(), time.monotonic()
        with self._lock:
            for stale in [k for k, answer in self._known.items() if answer.is_stale(now)]:
                del self._known[stale]
            known = self._known.get(digest)
            answer = known or self._known.setdefault(digest, _Answer(now))
        if known is None:
            answer.settle(ask)
        # Whoever asks meanwhile with the same token waits for the one answer.
        return answer.found.result()


def address_of(request: Any) -> str:
    """Return where a request comes from, to tell visitors without an account apart; or nothing.

    Behind the Hub's proxy it is the last address of the open network that was added to
    ``X-Forwarded-For``; what stands before it may be made up. A network of IPv6 counts as one.

    Args:
        request: gradio's, or starlette's; None where there is none.
    """
    if request is None:
        return ""
    found = [request.client.host if request.client else ""]
    if on_space():
        found += str(request.headers.get("x-forwarded-for") or "").split(",")[-4:]
    for text in reversed(found):
        try:
            address = ipaddress.ip_address(text.strip())
        except ValueError:
            continue
        if address.is_global or text == found[0]:
            wide = ipaddress.ip_network((address, 64 if address.version == 6 else 32), strict=False)
            return str(wide.network_address)
    return ""


def network_of(who: str) -> str:
    """Return the network of an address, which one owner may have whole; anything else as it is.

    Args:
        who: as `address_of` gives it, or an account's name after an ``@``.
    """
    try:
        address = ipaddress.ip_address(who)
    except ValueError:
        return who
    wide = ipaddress.ip_network((address, 24 if address.version == 4 else 48), strict=False)
    return str(wide)


def caller(request: Any) -> str:
    """Return `address_of` on a Space; at home all come from one address, and none is told apart."""
    return address_of(request) if on_space() else ""


def space_url(request: Any) -> str:
    """Return the address of this Space, as somebody elsewhere calls it.

    Args:
        request: gradio's.
    """
    if host := os.environ.get("SPACE_HOST"):
        return f"https://{host}"
    return str(request.headers.get("origin") or f"http://{request.headers.get('host')}")


def on_space() -> bool:
    """Whether this runs as a Space, where strangers visit."""
    return bool(os.environ.get("SPACE_ID"))


def at_home() -> bool:
    """Whether this runs where only the machine's own users can reach it."""
    shared = os.environ.get("GRADIO_SHARE", "").lower() in ("1", "true")
    here = os.environ.get("GRADIO_SERVER_NAME", "") in ("", *LOOPBACK)
    return here and not shared and not on_space()


def has_login() -> bool:
    """Whether whoever reaches this machine's page is signed in as its owner."""
    return at_home() and _own_token() is not None


def secret_key(secret: str) -> str:
    """Return what a record keeps of the secret that an anonymous visitor's browser holds."""
    return hashlib.sha256(secret.encode()).hexdigest() if secret else ""


def _own_token() -> str | None:
    """Return the token of whoever runs this: a Space's secret, or the login of this machine."""
    if on_space():
        return os.environ.get("HF_TOKEN") or None
    if not at_home():
        return None  # others can reach this machine: its login is not theirs
    from huggingface_hub import get_token

    return get_token()


def _ask_hub(token: str) -> Visitor:
    from resmerge_stream.hub.account import whoami
    from resmerge_stream.hub.client import client

    account = whoami(client(token))
    name = account.get("name")
    if account.get("type", "user") != "user" or not isinstance(name, str) or not name:
        raise PublishError("this token is not a person's.", Remedy.SIGN_IN_AGAIN)
    orgs = account.get("orgs") or ()
    names = (str(org["name"]) for org in orgs if org.get("roleInOrg") != "read" and "name" in org)
    return Visitor(name, token, tuple(names))
