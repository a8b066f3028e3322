"""What stands before every request: whose page asks, what is open at all, how much, how often."""

import hashlib
import hmac
import ipaddress
import os
import re
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable
from urllib.parse import urlsplit

from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import HTTPConnection
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from resmerge_stream.documents import load_json

from .identity import LOOPBACK, address_of, at_home, has_login, network_of

# A recipe has 32 kB at most; gradio adds the values of the form.
MAX_BODY_BYTES = 256 * 1024
# A page asks a few times when it opens, and then now and again; a class behind one address too.
BURST, A_SECOND = 60, 10.0
_TOO_LARGE = f"A request may have {MAX_BODY_BYTES} bytes here."
_TOO_OFTEN = f"This address asks more than {A_SECOND:g} times a second. Wait a second, ask again."
_KNOWN_ADDRESSES = 10_000

# All that this app answers. Gradio has more: uploads, recordings, links that keep a page's values,
# a proxy, files of its cache. Each would store or fetch what a stranger names, so none is open.
_ASSETS = r"/(svelte|static|assets)/.+|/favicon\.ico|/robots\.txt|/manifest\.json|/pwa_icon(/\w+)?"
_PAGES = r"/|/config"
_READ = re.compile(
    rf"{_PAGES}|{_ASSETS}|(/gradio_api)?/theme\.css|/login/(huggingface|callback)|/logout"
    r"|/(news|files)/.+"
    r"|/gradio_api/(user|login_check|token|app_id|info|openapi\.json|startup-events|queue/(data|status)"
    r"|heartbeat/[^/]+|call/.+|mcp(/.*)?)"
)
_WRITTEN = re.compile(r"/gradio_api/((call|run|api)/.+|queue/join|cancel|reset|mcp(/.*)?)")
_CALL = "/gradio_api/call/"
_IS_ASSET, _IS_PAGE = re.compile(_ASSETS), re.compile(_PAGES)
# Gradio makes a page anew for each who opens it, in as long as two calls take.
_PAGE_CALLS = 2


def gate(key: str) -> list[Middleware]:
    """Return what stands before the app, the outermost first.

    Args:
        key: of this start, see `new_key`; asked for at home only.
    """
    home = [Middleware(Doorway, key=key, is_locked=has_login)] if at_home() else []
    return [*home, Middleware(Pace), Middleware(Origins), Middleware(Limits), Middleware(Leaving)]


def new_key() -> str:
    """Return the key of one start: 256 random bits, for the address that is printed."""
    return secrets.token_urlsafe(32)


def address_with(address: str, key: str) -> str:
    """Return the address that lets a browser in; afterwards a cookie does."""
    return f"{address.rstrip('/')}/?{_QUERY}={key}"


_HEADER, _QUERY = "x-resmerge-key", "key"
# Gradio's own call while it starts; it tells nobody anything.
_OPEN = "/gradio_api/startup-events"


class Doorway:
    """Refuses other hosts and, where there is a login to misuse, other users of this machine.

    A page of another site reaches a server of this machine under a name of its own (DNS
    rebinding); another user of the machine connects directly.

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
        if urlsplit(f"//{request.headers.get('host', '')}").hostname not in LOOPBACK:
            return PlainTextResponse("This server answers to its own address only.", 403)
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


class Origins:
    """Refuses what pages of other sites ask, in whose visitors' names they would ask it.

    A browser that allows third-party cookies sends a visitor's sign-in along, and gradio answers
    every origin. A program sends no origin, and brings its own token.

    Args:
        app: what is behind.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request of another site's page; hand on every other."""
        if scope["type"] in ("http", "websocket"):
            headers = HTTPConnection(scope).headers
            origin = headers.get("origin")
            own = {headers.get("host", ""), os.environ.get("SPACE_HOST", "")} - {""}
            if origin is not None and urlsplit(origin).netloc not in own:
                answer = PlainTextResponse("Pages of other sites may not ask this server.", 403)
                await answer(scope, receive, send)
                return
        await self._app(scope, receive, send)


class Limits:
    """Refuses paths that are not open, bodies that are too large, and files in whatever form.

    Args:
        app: what is behind.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request that is refused; hand on every other, its body read and checked."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        reads = scope["method"] in ("GET", "HEAD", "OPTIONS")
        if not (_READ if reads else _WRITTEN).fullmatch(_plain(scope["path"])):
            await PlainTextResponse("There is nothing here.", 404)(scope, receive, send)
            return
        try:
            body = await _body(scope, receive)
        except HTTPException as exc:
            # Closed, or the server would go on to read what is refused.
            answer = PlainTextResponse(exc.detail, exc.status_code, {"connection": "close"})
            await answer(scope, receive, send)
            return
        given, started = False, False

        async def again() -> Message:
            nonlocal given
            if given:
                return await receive()  # when the visitor has gone
            given = True
            return {"type": "http.request", "body": body, "more_body": False}

        async def noting(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self._app(scope, again, noting)
        except TypeError as exc:
            # Of arguments by name that an endpoint does not have, or lacks.
            if started or not scope["path"].startswith(_CALL):
                raise
            await PlainTextResponse(str(exc), 400)(scope, receive, send)


async def _body(scope: Scope, receive: Receive) -> bytes:
    """Return a request's body, once it is known to hold no file.

    Raises:
        HTTPException: it is too large, no JSON, or holds a file.
    """
    declared = dict(scope["headers"]).get(b"content-length", b"0")
    if not declared.isdigit() or int(declared) > MAX_BODY_BYTES:
        raise HTTPException(413, _TOO_LARGE)
    body, more = b"", True
    while more:
        message = await receive()
        body += message.get("body", b"")
        more = message.get("more_body", False)
        if len(body) > MAX_BODY_BYTES:
            raise HTTPException(413, _TOO_LARGE)
    if body:
        try:
            value = load_json(body)
        except ValueError as exc:
            raise HTTPException(400, "A request must be JSON here.") from exc
        if _holds_file(value):
            raise HTTPException(403, "Nothing is uploaded here, and nothing fetched for a request.")
    return body


def _holds_file(value: object) -> bool:
    """Return whether gradio would take some part of a value for a file, and fetch or copy it."""
    waiting = [value]
    while waiting:
        part = waiting.pop()
        if isinstance(part, dict):
            # Gradio looks for {"path": …, "meta": {"_type": "gradio.FileData"}}.
            if "_type" in part or ("path" in part and "meta" in part):
                return True
            waiting += part.values()
        elif isinstance(part, list):
            waiting += part
    return False


class Pace:
    """Refuses calls of a network that has used up its share; each second gives some back.

    The machine's own network is never refused: at home there is nobody to be fair to.

    Args:
        app: what is behind.
        clock: seconds that only grow.
    """

    def __init__(self, app: ASGIApp, clock: Callable[[], float] = time.monotonic) -> None:
        self._app, self._clock = app, clock
        self._left: OrderedDict[str, tuple[float, float]] = OrderedDict()  # calls, as of when

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a call that comes too soon; hand on every other."""
        calls = _calls(scope)
        if calls and not self._may(HTTPConnection(scope), calls):
            answer = PlainTextResponse(_TOO_OFTEN, 429, {"retry-after": "1"})
            await answer(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _may(self, request: HTTPConnection, calls: int) -> bool:
        address = address_of(request)
        if not address or not ipaddress.ip_address(address).is_global:
            return True
        network, now = network_of(address), self._clock()
        left, then = self._left.pop(network, (float(BURST), now))
        left = min(left + (now - then) * A_SECOND, BURST)
        self._left[network] = left - calls if left >= calls else left, now
        if len(self._left) > _KNOWN_ADDRESSES:
            self._left.popitem(last=False)  # asked longest ago
        return left >= calls


def _calls(scope: Scope) -> int:
    """Return how many calls a request counts as: what is only read from a file counts as none."""
    if scope["type"] != "http":
        return 0
    path = _plain(scope["path"])
    if _IS_PAGE.fullmatch(path):
        return _PAGE_CALLS
    if scope["method"] == "POST":
        return 1
    # The description of all endpoints is made anew as well; what a page waits for is not.
    return int(path in ("/gradio_api/info", "/gradio_api/openapi.json"))


def _plain(path: str) -> str:
    """Return a path as gradio's routes read it: with or without a slash at the end."""
    return path.rstrip("/") or "/"


class Leaving:
    """Has the browser clear what this app keeps there, when somebody logs out.

    Nothing of the form, of the last job, or of the account is left.

    Args:
        app: what is behind.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Hand every request on; add the header to the answer of the logout."""

        async def clearing(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [
                    *message.get("headers", ()),
                    (b"clear-site-data", b'"storage"'),
                ]
            await send(message)

        leaves = scope["type"] == "http" and scope["path"] == "/logout"
        await self._app(scope, receive, clearing if leaves else send)
