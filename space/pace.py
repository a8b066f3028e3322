"""How often an address may ask: a stranger's script takes no more of the server than that."""

import ipaddress
import time
from collections import OrderedDict
from collections.abc import Callable

from starlette.requests import HTTPConnection
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from .identity import address_of, network_of

# A page asks a few times when it opens, and then now and again; a class behind one address too.
BURST, A_SECOND = 60, 10.0
_CALLS = "/gradio_api/"
# What has the whole page in it, and what it counts: gradio makes it anew, in as long as two calls.
_PAGES, _PAGE_CALLS = ("/", "/config"), 2
_KNOWN_ADDRESSES = 10_000
_TOO_OFTEN = f"This address asks more than {A_SECOND:g} times a second. Wait a second, ask again."


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
    """Return how many calls a request counts as."""
    if scope["type"] != "http":
        return 0
    if scope["path"] in _PAGES:
        return _PAGE_CALLS
    return int(scope["method"] == "POST" and scope["path"].startswith(_CALLS))
