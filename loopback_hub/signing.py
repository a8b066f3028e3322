"""URLs that carry their own permission and expire."""

import hashlib
import hmac
import secrets
import time
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlencode


class Signer:
    """Signs paths; the key lies on disk, so that URLs survive a restart of the Hub."""

    def __init__(self, key_file: Path) -> None:
        if not key_file.exists():
            key_file.parent.mkdir(parents=True, exist_ok=True)
            key_file.write_bytes(secrets.token_bytes(32))
        self._key = key_file.read_bytes()
        self._generation = 0

    def expire_all(self) -> None:
        """Make every URL that was signed so far expire now."""
        self._generation += 1

    def sign(self, method: str, path: str, lifetime: float, **params: str) -> str:
        """The path with a query that allows one method until it expires.

        `lifetime` is in seconds; `params` become part of the query and of what is signed.
        """
        expires = str(int(time.time() + lifetime))
        query = {**params, "expires": expires, "generation": str(self._generation)}
        return f"{path}?{urlencode({**query, 'signature': self._signature(method, path, query)})}"

    def allows(self, method: str, path: str, query: Mapping[str, str]) -> bool:
        """Whether a query as made by `sign` allows the method now."""
        rest = {name: value for name, value in query.items() if name != "signature"}
        if not hmac.compare_digest(query.get("signature", ""), self._signature(method, path, rest)):
            return False
        return int(rest["expires"]) > time.time() and int(rest["generation"]) == self._generation

    def _signature(self, method: str, path: str, query: Mapping[str, str]) -> str:
        # HEAD and GET are one permission: clients look before they read.
        text = "\n".join(
            ["GET" if method == "HEAD" else method, path, urlencode(sorted(query.items()))]
        )
        return hmac.new(self._key, text.encode(), hashlib.sha256).hexdigest()
