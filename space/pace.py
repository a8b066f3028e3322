"""How often an address may call: a stranger's script takes no more of the server than that."""

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
_KNOWN_ADDRESSES = 10_000
_TOO_OFTEN = f"This address calls more than {A_SECOND:g} times a second. Wait a second, ask again."


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
        is_call = scope["type"] == "http" and scope["method"] == "POST"
        if is_call and scope["path"].startswith(_CALLS) and not self._may(HTTPConnection(scope)):
            answer = PlainTextResponse(_TOO_OFTEN, 429, {"retry-after": "1"})
            await answer(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _may(self, request: HTTPConnection) -> bool:
        address = address_of(request)
        if not address or not ipaddress.ip_address(address).is_global:
            return True
        network, now = network_of(address), self._clock()
        left, then = self._left.pop(network, (float(BURST), now))
        left = min(left + (now - then) * A_SECOND, BURST)
        self._left[network] = max(left - 1, 0.0) if left >= 1 else left, now
        if len(self._left) > _KNOWN_ADDRESSES:
            self._left.popitem(last=False)  # asked longest ago
        return left >= 1
