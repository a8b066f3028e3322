"""How fast the Hub serves: latency for every request, bandwidth for every client, each way."""

import asyncio
import time
from dataclasses import dataclass, field
from typing import Literal

BURST_SECONDS = 0.02  # shorter waits are not worth a sleep


@dataclass(slots=True)
class Pace:
    """One direction of one client: bytes take their time one after another."""

    free_at: float = 0.0

    async def spend(self, nbytes: int, rate: float) -> None:
        """Wait until `nbytes` more fit into `rate` bytes a second."""
        now = time.monotonic()
        self.free_at = max(self.free_at, now) + nbytes / rate
        wait = self.free_at - now
        if wait > BURST_SECONDS:
            await asyncio.sleep(wait)


@dataclass(slots=True)
class Limits:
    """Limits in force; every attribute may be changed at any time.

    Attributes:
        down, up: bytes a second that one client may receive and send; None for no limit.
        latency: seconds that every request waits.
        per: what counts as one client: a process of this machine, a user agent, or all together.
    """

    down: float | None = None
    up: float | None = None
    latency: float = 0.0
    per: Literal["process", "agent", "all"] = "process"
    _paces: dict[tuple[str, object], Pace] = field(default_factory=dict)

    async def spend(self, direction: Literal["down", "up"], client: object, nbytes: int) -> None:
        """Let a client's bytes through as fast as its limit allows."""
        rate = self.down if direction == "down" else self.up
        if rate is not None and nbytes:
            await self._paces.setdefault((direction, client), Pace()).spend(nbytes, rate)
