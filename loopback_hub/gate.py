"""The gate of one port, where a request gets its faults, its pace and its line in the log."""

import re
import time
from collections.abc import Callable

from starlette.types import ASGIApp, Receive, Scope, Send

from .exchange import AnsweredError, Connection, ConnectionLostError, Exchange
from .faults import Faults
from .limits import Limits
from .log import Entry, RequestLog

_SIGNATURE = re.compile(r"(?<=[?&]signature=)[^&]*")
_SECRET_HEADERS = frozenset({"authorization", "cookie", "x-hf-token"})


class Gate:
    """The ASGI application of one port.

    `user_of` names the user whose Authorization header it is given.
    """

    def __init__(
        self,
        port: str,
        app: ASGIApp,
        *,
        log: RequestLog,
        limits: Limits,
        faults: Faults,
        user_of: Callable[[str], str | None],
    ) -> None:
        self._port, self._app = port, app
        self._log, self._limits, self._faults = log, limits, faults
        self._user_of = user_of
        self._processes: set[int] = set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass one request through."""
        started = time.time()
        query = scope["query_string"].decode()
        path = scope["raw_path"].decode() + (f"?{query}" if query else "")
        headers = {name.decode(): value.decode("latin-1") for name, value in scope["headers"]}
        connection: Connection = scope["state"]["connection"]
        pid = connection.client(self._processes)
        asked = headers.get("range", "")
        rules = self._faults.strike(scope["method"], path, self._port, asked)

        def record(exchange: Exchange) -> None:
            entry = Entry(
                time=started,
                port=self._port,
                method=scope["method"],
                path=_SIGNATURE.sub("-", path),
                status=exchange.status,
                received=exchange.received,
                sent=exchange.sent,
                headers={name: headers[name] for name in headers.keys() - _SECRET_HEADERS},
                user=self._user_of(headers.get("authorization", "")),
                pid=pid,
                faults=tuple(rule.name for rule in rules),
            )
            self._log.add(entry)

        by_kind = {"process": pid, "agent": headers.get("user-agent"), "all": None}
        client = by_kind[self._limits.per]
        exchange = Exchange(
            scope, receive, send, rules=rules, limits=self._limits, client=client, on_end=record
        )
        try:
            await exchange.run(self._app)
        except AnsweredError:
            pass
        except ConnectionLostError:
            # uvicorn reports an answer that ends early as a bug, unless it knows of the disconnect.
            while (await receive())["type"] != "http.disconnect":
                pass
        finally:
            exchange.end()
