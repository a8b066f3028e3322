"""What was asked of the Hub and what it answered, without secrets."""

import json
import re
from collections import deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from threading import Lock

LONGEST_LOG = 200_000  # the oldest entries go first, so that a long benchmark does not fill memory


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One request with its answer.

    Attributes:
        port: `api` or `cdn`.
        path: as sent, percent-encoded, with the query; signatures are replaced by `-`.
        status: None when the connection was reset before an answer.
        received: bytes of request body that arrived.
        sent: bytes of response body that were sent.
        headers: request headers in lower case, without credentials.
        user: whose token came with it.
        pid: the client's process on this machine, where it can be told.
        faults: names of the faults that struck.
    """

    time: float
    port: str
    method: str
    path: str
    status: int | None
    received: int
    sent: int
    headers: dict[str, str] = field(default_factory=dict)
    user: str | None = None
    pid: int | None = None
    faults: tuple[str, ...] = ()

    @property
    def range(self) -> str | None:
        """The Range header, if one was sent."""
        return self.headers.get("range")


class RequestLog:
    """The finished requests in the order in which they finished."""

    def __init__(self, file: Path | None = None) -> None:
        self._entries: deque[Entry] = deque(maxlen=LONGEST_LOG)
        self._file = file
        self._lock = Lock()

    def add(self, entry: Entry) -> None:
        """Append an entry, also to the file (one JSON object a line) if there is one."""
        with self._lock:
            self._entries.append(entry)
            if self._file is not None:
                with self._file.open("a") as file:
                    file.write(json.dumps(asdict(entry)) + "\n")

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            self._entries.clear()

    def __iter__(self) -> Iterator[Entry]:
        with self._lock:
            return iter(tuple(self._entries))

    def __len__(self) -> int:
        return len(self._entries)

    def find(
        self,
        *,
        method: str | None = None,
        path: str | None = None,
        port: str | None = None,
        status: int | None = None,
        pid: int | None = None,
    ) -> list[Entry]:
        """The entries that match: by regular expression for method and path, else by equality."""
        return [
            entry
            for entry in self
            if (method is None or re.fullmatch(method, entry.method))
            and (path is None or re.search(path, entry.path))
            and (port is None or entry.port == port)
            and (status is None or entry.status == status)
            and (pid is None or entry.pid == pid)
        ]
