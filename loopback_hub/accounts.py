"""Who exists, whose a token is, who may read or write what; of tokens only digests are kept."""

import hashlib
import json
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from .repo import Repo, write_json

Role = Literal["read", "write", "contribute"]
"""What a token may do: read, write where its user may, or write only to what it created itself."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """The bearer of a valid token.

    Attributes:
        user: whose token it is.
        role: what it may do.
        maker: what a repository remembers of its creator: this token, or this user in this app.
        scopes: what an app's user agreed to; None for a token of the user's own, which sees all
            that its user sees.
        expires: when it ends, in seconds since the epoch; None for never.
    """

    user: str
    role: Role
    maker: str
    scopes: tuple[str, ...] | None = None
    expires: float | None = None

    def has_scope(self, *names: str) -> bool:
        """Whether the token carries one of these scopes; a user's own token carries all."""
        return self.scopes is None or bool(set(names) & set(self.scopes))


def role_of(scopes: Sequence[str]) -> Role:
    """What an app's token may do; `write-repos` and `manage-repos` are one thing here."""
    if {"write-repos", "manage-repos"} & set(scopes):
        return "write"
    return "contribute" if "contribute-repos" in scopes else "read"


def digest(token: str) -> str:
    """What is stored of a token."""
    return hashlib.sha256(token.encode()).hexdigest()


class Accounts:
    """Users, organisations and tokens in one JSON file, which survives a restart."""

    def __init__(self, path: Path) -> None:
        self._path = path
        empty: dict[str, dict[str, Any]] = {"users": {}, "orgs": {}, "tokens": {}, "quotas": {}}
        self._data = json.loads(path.read_text()) if path.exists() else empty

    def _save(self) -> None:
        write_json(self._path, self._data)

    def add_user(self, name: str, *, pro: bool = False) -> None:
        """Add a user, or change an existing one."""
        self._data["users"][name] = {"pro": pro}
        self._save()

    def add_org(self, name: str, members: Mapping[str, str]) -> None:
        """Add an organisation; members map user → `read`, `write` or `admin`."""
        self._data["orgs"][name] = {"members": dict(members)}
        self._save()

    def add_token(self, user: str, role: Role, token: str | None = None) -> str:
        """Give a user a token, made up if none is given, and return it."""
        token = token or f"hf_{secrets.token_hex(16)}"
        self._data["tokens"][digest(token)] = {"user": user, "role": role}
        self._save()
        return token

    def add_app_token(self, user: str, app: str, scopes: Sequence[str], *, lifetime: float) -> str:
        """Give an app a token of a user's, good for `lifetime` seconds, and return it."""
        token = f"hf_oauth_{secrets.token_hex(16)}"
        self._data["tokens"][digest(token)] = {
            "user": user,
            "role": role_of(scopes),
            "maker": f"{app}:{user}",
            "scopes": list(scopes),
            "expires": time.time() + lifetime,
        }
        self._save()
        return token

    def users(self) -> list[str]:
        """The users' names."""
        return list(self._data["users"])

    def revoke(self, token: str) -> None:
        """Make a token invalid."""
        self._data["tokens"].pop(digest(token), None)
        self._save()

    def set_quota(self, namespace: str, limit_bytes: int | None) -> None:
        """Limit what the private repositories of a namespace may hold; None lifts the limit."""
        self._data["quotas"][namespace] = limit_bytes
        self._save()

    def quota(self, namespace: str) -> int | None:
        """The limit of a namespace in bytes, if it has one."""
        return self._data["quotas"].get(namespace)

    def identify(self, token: str) -> Identity | None:
        """Whose token this is; None when it is unknown, revoked or expired."""
        known = self._data["tokens"].get(digest(token))
        if known is None or known.get("expires", time.time() + 1) <= time.time():
            return None
        scopes = known.get("scopes")
        return Identity(
            user=known["user"],
            role=known["role"],
            maker=known.get("maker", digest(token)),
            scopes=None if scopes is None else tuple(scopes),
            expires=known.get("expires"),
        )

    def whoami(self, identity: Identity) -> dict[str, Any]:
        """The Hub's answer to `whoami-v2`."""
        user = identity.user
        return {
            "type": "user",
            "id": f"user-{user}",
            "name": user,
            "fullname": user,
            "isPro": self._data["users"].get(user, {}).get("pro", False),
            "canPay": True,
            "orgs": self.orgs_of(user),
            "auth": self._auth(identity),
        }

    def orgs_of(self, user: str) -> list[dict[str, str]]:
        """A user's organisations, as `whoami-v2` lists them."""
        return [
            {
                "type": "org",
                "id": f"org-{name}",
                "name": name,
                "fullname": name,
                "roleInOrg": org["members"][user],
            }
            for name, org in self._data["orgs"].items()
            if user in org["members"]
        ]

    def _auth(self, identity: Identity) -> dict[str, Any]:
        if identity.expires is not None:
            until = datetime.fromtimestamp(identity.expires, UTC).isoformat(timespec="milliseconds")
            return {"type": "oauth", "expiresAt": until.replace("+00:00", "Z")}
        token = {
            "displayName": "loopback",
            "role": identity.role,
            "createdAt": "2026-01-01T00:00:00.000Z",
        }
        return {"type": "access_token", "accessToken": token}

    def _membership(self, identity: Identity | None, namespace: str) -> str | None:
        if identity is None:
            return None
        if identity.user == namespace:
            return "admin"
        members: dict[str, str] = self._data["orgs"].get(namespace, {"members": {}})["members"]
        return members.get(identity.user)

    def may_see(self, identity: Identity | None, repo: Repo) -> bool:
        """Whether the repository exists at all for this caller."""
        if not repo.settings["private"]:
            return True
        if identity is None or self._membership(identity, repo.namespace) is None:
            return False
        return self._made(identity, repo) or identity.has_scope(
            "read-repos", "write-repos", "manage-repos"
        )

    def may_download(self, identity: Identity | None, repo: Repo) -> bool:
        """Whether a gated repository lets this caller at its files."""
        settings = repo.settings
        if not settings["gated"] or self._membership(identity, repo.namespace) is not None:
            return True
        if identity is None or not identity.has_scope("gated-repos"):
            return False
        return identity.user in settings["granted"]

    def _made(self, identity: Identity, repo: Repo) -> bool:
        return bool(repo.settings["created_by"] == identity.maker)

    def may_create(self, identity: Identity, namespace: str) -> bool:
        """Whether the caller may create repositories in a namespace."""
        return identity.role != "read" and self._membership(identity, namespace) in (
            "write",
            "admin",
        )

    def may_write(self, identity: Identity, repo: Repo) -> bool:
        """Whether the caller may change a repository."""
        if not self.may_create(identity, repo.namespace):
            return False
        return identity.role == "write" or self._made(identity, repo)
