"""The codes that a sign-in hands to an app, and the key that signs who signed in."""

import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from joserfc import jwt
from joserfc.jwk import RSAKey

CODE_LIFETIME = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Granted:
    """What a user agreed to: which app may do what, and where its answer goes."""

    user: str
    client_id: str
    redirect_uri: str
    scopes: tuple[str, ...]
    nonce: str | None
    until: float


class SignIns:
    """Codes in memory, each good once and for a minute; the key lies on disk.

    The key is made when it is first needed: most Hubs are never signed in to.
    """

    def __init__(self, key_file: Path) -> None:
        self._key_file = key_file
        self._granted: dict[str, Granted] = {}

    def _key(self) -> RSAKey:
        if not self._key_file.exists():
            key = RSAKey.generate_key(2048, {"use": "sig", "alg": "RS256"}, auto_kid=True)
            self._key_file.parent.mkdir(parents=True, exist_ok=True)
            self._key_file.write_bytes(key.as_pem(private=True))
        options = {"use": "sig", "alg": "RS256", "kid": "loopback"}
        return RSAKey.import_key(self._key_file.read_bytes(), options)

    def grant(
        self,
        user: str,
        *,
        client_id: str,
        redirect_uri: str,
        scopes: tuple[str, ...],
        nonce: str | None,
    ) -> str:
        """Return a code for what a user agreed to."""
        code = secrets.token_urlsafe(24)
        self._granted[code] = Granted(
            user=user,
            client_id=client_id,
            redirect_uri=redirect_uri,
            scopes=scopes,
            nonce=nonce,
            until=time.time() + CODE_LIFETIME,
        )
        return code

    def redeem(self, code: str) -> Granted | None:
        """What a code stands for, once; None for a code that was used, is too old or made up."""
        granted = self._granted.pop(code, None)
        return granted if granted is not None and granted.until > time.time() else None

    def sign(self, claims: Mapping[str, Any]) -> str:
        """The claims as a JSON Web Token with an RS256 signature."""
        return jwt.encode({"alg": "RS256", "kid": "loopback"}, dict(claims), self._key())

    def public_keys(self) -> dict[str, Any]:
        """The key set with which such tokens are checked."""
        return {"keys": [self._key().as_dict(private=False)]}
