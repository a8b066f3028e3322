"""Who exists, whose a token is, who may read or write what; of tokens only digests are kept."""

import hashlib
import json
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from .repo import Repo, write_json

Role = Literal["read", "write", "contribute"]
"""What a token may do: read, write where its user may, or write only to what it created itself."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """The bearer of a valid token."""

    user: str
    role: Role
    digest: str


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
        """Whose token this is; None when it is unknown or revoked."""
        known = self._data["tokens"].get(digest(token))
        return (
            Identity(user=known["user"], role=known["role"], digest=digest(token))
            if known
            else None
        )

    def whoami(self, identity: Identity) -> dict[str, Any]:
        """The Hub's answer to `whoami-v2`."""
        user = identity.user
        orgs = [
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
        token = {
            "displayName": "loopback",
            "role": identity.role,
            "createdAt": "2026-01-01T00:00:00.000Z",
        }
        return {
            "type": "user",
            "id": f"user-{user}",
            "name": user,
            "fullname": user,
            "isPro": self._data["users"].get(user, {}).get("pro", False),
            "canPay": True,
            "orgs": orgs,
            "auth": {"type": "access_token", "accessToken": token},
        }

    def _membership(self, identity: Identity | None, namespace: str) -> str | None:
        if identity is None:
            return None
        if identity.user == namespace:
            return "admin"
        members: dict[str, str] = self._data["orgs"].get(namespace, {"members": {}})["members"]
        return members.get(identity.user)

    def may_see(self, identity: Identity | None, repo: Repo) -> bool:
        """Whether the repository exists at all for this caller."""
        return (
            not repo.settings["private"] or self._membership(identity, repo.namespace) is not None
        )

    def may_download(self, identity: Identity | None, repo: Repo) -> bool:
        """Whether a gated repository lets this caller at its files."""
        settings = repo.settings
        if not settings["gated"] or self._membership(identity, repo.namespace) is not None:
            return True
        return identity is not None and identity.user in settings["granted"]

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
        return identity.role == "write" or repo.settings["created_by"] == identity.digest
