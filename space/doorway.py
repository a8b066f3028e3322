"""Who gets in where the Space runs on somebody's own machine: whoever has the printed address."""

import hashlib
import hmac
import secrets
from collections.abc import Callable
from urllib.parse import urlsplit

from starlette.requests import HTTPConnection
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

LOOPBACK = ("127.0.0.1", "localhost", "::1")
_HEADER, _QUERY = "x-resmerge-key", "key"
# Gradio's own call while it starts; it tells nobody anything.
_OPEN = "/gradio_api/startup-events"


def new_key() -> str:
    """Return the key of one start: 256 random bits, for the address that is printed."""
    return secrets.token_urlsafe(32)


def address_with(address: str, key: str) -> str:
    """Return the address that lets a browser in; afterwards a cookie does."""
    return f"{address.rstrip('/')}/?{_QUERY}={key}"


class Doorway:
    """Refuses other hosts, other origins and, where there is a login to misuse, other users.

    A page of another site reaches a server of this machine under a name of its own (DNS
    rebinding), or from its own origin; another user of the machine connects directly.

    Args:
        app: what is behind.
        key: what the address has in it.
        is_locked: whether the key is asked for: somebody's login would be used.
    """

    def __init__(self, app: ASGIApp, key: str, is_locked: Callable[[], bool]) -> None:
        self._app, self._key, self._is_locked = app, key, is_locked
        # Browsers share cookies between the ports of a host: each start has a name of its own.
        self._cookie = f"resmerge_{hashlib.sha256(key.encode()).hexdigest()[:8]}"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request that may not pass; hand on every other."""
        answer = None
        if scope["type"] in ("http", "websocket"):
            answer = self._answer(HTTPConnection(scope))
        await (answer or self._app)(scope, receive, send)

    def _answer(self, request: HTTPConnection) -> Response | None:
        host, origin = request.headers.get("host", ""), request.headers.get("origin")
        if urlsplit(f"//{host}").hostname not in LOOPBACK:
            return PlainTextResponse("This server answers to its own address only.", 403)
        if origin is not None and urlsplit(origin).netloc != host:
            return PlainTextResponse("Pages of other sites may not ask this server.", 403)
        if request.url.path == _OPEN or not self._is_locked():
            return None
        if self._is_key(request.query_params.get(_QUERY)):
            answer = RedirectResponse(request.url.path, 303)
            answer.set_cookie(self._cookie, self._key, httponly=True, samesite="strict")
            return answer
        known = (request.cookies.get(self._cookie), request.headers.get(_HEADER))
        if any(map(self._is_key, known)):
            return None
        return PlainTextResponse("Open the address that was printed when this was started.", 401)

    def _is_key(self, text: str | None) -> bool:
        return text is not None and hmac.compare_digest(text.encode(), self._key.encode())
