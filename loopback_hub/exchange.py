"""One request and its answer on their way through limits and faults, down to the TCP connection."""

import asyncio
import re
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from .clients import process_of
from .faults import (
    Answer,
    Cut,
    Delay,
    Flip,
    Hold,
    Hook,
    IgnoreRange,
    Reset,
    Rule,
    Trickle,
    WrongRange,
)
from .limits import Limits


@dataclass(slots=True)
class Connection:
    """The TCP connection under a request, which the ASGI interface does not show."""

    transport: asyncio.Transport
    pid: int | None = None
    asked: bool = False

    def client(self, known: set[int]) -> int | None:
        """The client's process, looked up once a connection and added to the known ones."""
        if not self.asked:
            self.asked = True
            peer, own = map(self.transport.get_extra_info, ("peername", "sockname"))
            if peer and own:
                self.pid = process_of(peer[1], own[1], tuple(known))
            if self.pid is not None:
                known.add(self.pid)
        return self.pid

    def reset(self) -> None:
        """Send RST."""
        raw = self.transport.get_extra_info("socket")
        if raw is not None:
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.transport.abort()


class Protocol(H11Protocol):
    """uvicorn's HTTP/1.1 protocol that also hands its connection to the application."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Keep the connection where `scope["state"]` is made from."""
        super().connection_made(transport)
        self.app_state = {**self.app_state, "connection": Connection(transport)}


class ConnectionLostError(Exception):
    """The connection is gone, by a fault or by the client's will."""


class AnsweredError(Exception):
    """A fault's answer took the place of the handler's."""


class Exchange:
    """One request with its answer.

    `on_end` is called once, before the client can know how its request ended.
    """

    def __init__(
        self,
        scope: Scope,
        receive: Receive,
        send: Send,
        *,
        rules: tuple[Rule, ...],
        limits: Limits,
        client: object,
        on_end: Callable[["Exchange"], None],
    ) -> None:
        self.status: int | None = None
        self.received = self.sent = 0
        self._connection: Connection = scope["state"]["connection"]
        self._scope, self._receive, self._send = scope, receive, send
        self._rules, self._limits, self._client = rules, limits, client
        self._on_end: Callable[[Exchange], None] | None = on_end
        self._request_over = False
        self._cut_at: int | None = None
        self._first_byte = 0
        self._held: list[Message] = []

    async def run(self, app: ASGIApp) -> None:
        """Handle the request, as far as its faults allow."""
        delay: Delay | None = self._first(Delay)
        await asyncio.sleep(self._limits.latency + (delay.seconds if delay else 0.0))
        hold: Hold | None = self._first(Hold)
        if hold is not None:
            while not self._request_over:
                self._held.append(await self.receive())
        # After that: a hook that kills the client must not cut off the request that is to be held.
        hook: Hook | None = self._first(Hook)
        if hook is not None:
            await asyncio.to_thread(hook.call)
        reset: Reset | None = self._first(Reset)
        if reset is not None and not reset.received:
            self._break()
        answer: Answer | None = self._first(Answer)
        if answer is not None:
            await self._drain()
            await self._answer(answer)
        if hold is not None:
            await asyncio.to_thread(hold.until.wait)
        scope = self._scope
        if self._first(IgnoreRange) is not None:
            scope = {**scope, "headers": [h for h in scope["headers"] if h[0] != b"range"]}
        await app(scope, self.receive, self.send)

    async def receive(self) -> Message:
        """Let request bytes in at the client's pace."""
        if self._held and self._request_over:
            return self._held.pop(0)
        message = await self._receive()
        if message["type"] == "http.disconnect":
            raise ConnectionLostError
        body = message.get("body", b"")
        self._request_over = not message.get("more_body", False)
        self.received += len(body)
        reset: Reset | None = self._first(Reset)
        if reset is not None and 0 < reset.received <= self.received:
            self._break()
        await self._limits.spend("up", self._client, len(body))
        return message

    async def send(self, message: Message) -> None:
        """Let answer bytes out at the client's pace, unless a fault replaces or cuts the answer."""
        if message["type"] == "http.response.start":
            await self._drain()
            await self._replace_answer()
            await self._emit(self._damaged(message))
            return
        body = message.get("body", b"")
        await self._limits.spend("down", self._client, len(body))
        body = self._flipped(body)
        message = {**message, "body": body}
        trickle: Trickle | None = self._first(Trickle)
        if trickle is not None:
            body = await self._trickle(trickle, body)
            message = {**message, "body": body}
        if self._cut_at is not None and self.sent + len(body) >= self._cut_at:
            await self._emit(
                {**message, "body": body[: self._cut_at - self.sent], "more_body": True}
            )
            self.end()
            self._connection.transport.close()
            raise ConnectionLostError
        await self._emit(message)
        if self._connection.transport.is_closing():
            raise ConnectionLostError

    def end(self) -> None:
        """Report the end, if that has not been done."""
        if self._on_end is not None:
            on_end, self._on_end = self._on_end, None
            on_end(self)

    def _first(self, kind: type, *, after: bool = False) -> Any:
        fitting = (rule.action for rule in self._rules if rule.after == after)
        return next((action for action in fitting if isinstance(action, kind)), None)

    async def _drain(self) -> None:
        # A client that is still sending when the answer comes may not read it.
        while not self._request_over:
            await self.receive()

    async def _emit(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
        else:
            self.sent += len(message.get("body", b""))
            if not message.get("more_body", False):
                self.end()
        await self._send(message)

    def _break(self) -> NoReturn:
        self.end()
        self._connection.reset()
        raise ConnectionLostError

    def _flipped(self, body: bytes) -> bytes:
        first = self._first_byte + self.sent
        for flip in (rule.action for rule in self._rules if isinstance(rule.action, Flip)):
            changed = bytearray(body)
            for position, bits in enumerate(flip.bits, flip.position - first):
                if 0 <= position < len(changed):
                    changed[position] ^= bits
            body = bytes(changed)
        return body

    async def _trickle(self, trickle: Trickle, body: bytes) -> bytes:
        step = max(trickle.rate // 10, 1)
        while len(body) > step:
            await self._emit({"type": "http.response.body", "body": body[:step], "more_body": True})
            body = body[step:]
            await asyncio.sleep(0.1)
            if self._connection.transport.is_closing():
                raise ConnectionLostError
        return body

    async def _answer(self, answer: Answer) -> NoReturn:
        headers = {**answer.headers, "X-Error-Message": answer.message}
        if answer.code is not None:
            headers["X-Error-Code"] = answer.code
        response: Response = JSONResponse({"error": answer.message}, answer.status, headers)
        if answer.page is not None:
            response = HTMLResponse(answer.page, answer.status)
        await response(self._scope, self._receive, self._emit)
        raise AnsweredError

    async def _replace_answer(self) -> None:
        hook: Hook | None = self._first(Hook, after=True)
        if hook is not None:
            await asyncio.to_thread(hook.call)
        if self._first(Reset, after=True) is not None:
            self._break()
        answer: Answer | None = self._first(Answer, after=True)
        if answer is not None:
            await self._answer(answer)

    def _damaged(self, start: Message) -> Message:
        headers = dict(start["headers"])
        if b"content-range" in headers:
            self._first_byte = int(re.findall(rb"\d+", headers[b"content-range"])[0])
        cut: Cut | None = self._first(Cut)
        length = int(headers.get(b"content-length", b"0"))
        if cut is not None and length:
            self._cut_at = int(length * cut.fraction)
        if self._first(WrongRange) is not None and b"content-range" in headers:
            numbers = re.findall(rb"\d+", headers[b"content-range"])
            headers[b"content-range"] = b"bytes %d-%d/%d" % tuple(int(n) + 1 for n in numbers)
        return {**start, "headers": list(headers.items())}
