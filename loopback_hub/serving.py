"""Several ASGI applications, each on a port of 127.0.0.1, served from one thread."""

import asyncio
import contextlib
import socket
import threading
from collections.abc import Mapping

import uvicorn
from starlette.types import ASGIApp

from .exchange import Protocol

HOST = "127.0.0.1"
START_SECONDS = 30


class Serving:
    """Applications by name, each with its port; a port of 0 becomes a free one and is then kept."""

    def __init__(self, apps: Mapping[str, ASGIApp], ports: Mapping[str, int]) -> None:
        self._apps, self._ports = dict(apps), dict(ports)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stopping: asyncio.Event | None = None
        self._thread: threading.Thread | None = None

    def url(self, name: str) -> str:
        """Where an application is served, once it has been started."""
        return f"http://{HOST}:{self._ports[name]}"

    def listen(self) -> list[socket.socket]:
        """Open the ports; from here on `url` is right."""
        sockets = {name: _listen(port) for name, port in self._ports.items()}
        self._ports = {name: sock.getsockname()[1] for name, sock in sockets.items()}
        return list(sockets.values())

    def start(self, sockets: list[socket.socket]) -> None:
        """Serve on the open ports, and return when requests are answered."""
        ready = threading.Event()
        serving = self._serve(sockets, ready)
        self._thread = threading.Thread(target=asyncio.run, args=(serving,), daemon=True)
        self._thread.start()
        if not ready.wait(START_SECONDS):
            raise TimeoutError("the server does not start")

    def stop(self) -> None:
        """Stop serving; connections in use are dropped."""
        if self._thread is not None and self._loop is not None and self._stopping is not None:
            self._loop.call_soon_threadsafe(self._stopping.set)
            self._thread.join()
        self._thread = None

    async def _serve(self, sockets: list[socket.socket], ready: threading.Event) -> None:
        self._loop, self._stopping = asyncio.get_running_loop(), asyncio.Event()
        servers = [_server(app) for app in self._apps.values()]
        pairs = zip(servers, sockets, strict=True)
        tasks = [asyncio.create_task(server.serve(sockets=[sock])) for server, sock in pairs]
        while not all(server.started for server in servers):
            await asyncio.sleep(0.002)
        ready.set()
        await self._stopping.wait()
        # Not uvicorn's own shutdown, which waits for its clients.
        for server in servers:
            for listener in server.servers:
                listener.close()
            for connection in tuple(server.server_state.connections):
                connection.transport.abort()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _server(app: ASGIApp) -> uvicorn.Server:
    config = uvicorn.Config(
        app,
        http=Protocol,
        ws="none",
        lifespan="off",
        proxy_headers=False,
        log_config=None,
        access_log=False,
        log_level="error",  # a bug in a handler shows its traceback
        timeout_keep_alive=60,  # longer than a client keeps a connection in its pool
    )
    return uvicorn.Server(config)


def _listen(port: int) -> socket.socket:
    with contextlib.ExitStack() as on_error:
        # asyncio sends small answers at once only where a socket says which protocol it speaks:
        # otherwise each waits 40 ms for the client's acknowledgement.
        listening = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        sock = on_error.enter_context(listening)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((HOST, port))
        on_error.pop_all()
        return sock
