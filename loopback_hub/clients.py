"""Which process of this machine is at the other end of a loopback connection, read from /proc."""

import os
from collections.abc import Iterable
from pathlib import Path


def process_of(client_port: int, server_port: int, likely: Iterable[int] = ()) -> int | None:
    """Process id of the client of a loopback connection; None where it cannot be told.

    Args:
        client_port: the client's end of the connection.
        server_port: the other end.
        likely: process ids to look at first; the scan over all processes is the slow part.
    """
    socket = _socket_of(client_port, server_port)
    if socket is None:
        return None
    others = (int(name) for name in os.listdir("/proc") if name.isdigit())
    return next((pid for pids in (likely, others) for pid in pids if _holds(pid, socket)), None)


def _socket_of(client_port: int, server_port: int) -> str | None:
    try:
        lines = Path("/proc/net/tcp").read_text().splitlines()[1:]
    except OSError:  # not Linux
        return None
    for line in lines:
        fields = line.split()
        ends = tuple(int(address.rsplit(":", 1)[1], 16) for address in fields[1:3])
        if ends == (client_port, server_port):
            return f"socket:[{fields[9]}]"
    return None


def _holds(pid: int, socket: str) -> bool:
    try:
        names = os.listdir(f"/proc/{pid}/fd")
    except OSError:  # the process is gone, or is another user's
        return False
    return any(_target(f"/proc/{pid}/fd/{name}") == socket for name in names)


def _target(link: str) -> str | None:
    try:
        return os.readlink(link)
    except OSError:  # closed meanwhile
        return None
