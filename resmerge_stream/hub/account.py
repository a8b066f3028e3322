"""Whose token it is, what it may do, and for how long."""

import time
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from huggingface_hub.errors import LocalTokenNotFoundError
from huggingface_hub.hf_api import HfApi

from ..errors import PublishError, Remedy, StoppedError
from .client import TokenRefusedError, patiently


def whoami(api: HfApi) -> dict[str, Any]:
    """Return the Hub's answer to whose token this is.

    Raises:
        PublishError: there is no token, or the Hub does not accept it.
        StoppedError: the network or the Hub kept failing.
    """

    def ask() -> dict[str, Any]:
        answer: dict[str, Any] = api.whoami()
        return answer

    for is_last in (False, True):
        try:
            return patiently(ask, what="ask the Hub whose token this is")
        except TokenRefusedError as exc:
            if is_last:
                raise PublishError(
                    "the Hub does not accept the token (expired, revoked or mistyped).",
                    Remedy.SIGN_IN_AGAIN,
                    kind="bad-token",
                ) from exc
        except StoppedError as exc:
            if isinstance(exc.__cause__, LocalTokenNotFoundError):
                raise PublishError("publishing needs an account", Remedy.SIGN_IN) from exc
            raise
    raise AssertionError("unreachable")


def rights_missing(account: Mapping[str, Any], repo_id: str) -> list[str]:
    """Return why an account may not write to a repository of that name, as far as it is known."""
    namespace, problems = repo_id.split("/")[0], []
    user = account.get("name")
    orgs = {str(org.get("name")): org.get("roleInOrg") for org in account.get("orgs") or ()}
    if namespace != user and namespace not in orgs:
        problems.append(
            f"you are signed in as {user!r} and cannot publish under {namespace!r}: publish to "
            "your own namespace, or to an organisation of yours."
        )
    elif namespace != user and orgs[namespace] == "read":
        problems.append(f"{user!r} may read but not write in {namespace!r}.")
    access = (account.get("auth") or {}).get("accessToken") or {}
    if access.get("role") == "read":
        problems.append(
            "the token may only read. Make one that may write (huggingface.co/settings/tokens)."
        )
    scopes = (access.get("fineGrained") or {}).get("scoped")
    if access.get("role") == "fineGrained" and isinstance(scopes, list):
        names = {str((scope.get("entity") or {}).get("name")): scope for scope in scopes}
        allowed = names.get(namespace) or names.get(repo_id) or {}
        if "repo.write" not in (allowed.get("permissions") or ()):
            problems.append(f"the token has no right to write in {namespace!r}.")
    return problems


def seconds_left(account: Mapping[str, Any]) -> float | None:
    """Return for how long the token is good, or None where the Hub does not say."""
    expires = (account.get("auth") or {}).get("expiresAt")
    if not isinstance(expires, str):
        return None
    try:
        return datetime.fromisoformat(expires.replace("Z", "+00:00")).timestamp() - time.time()
    except ValueError:
        return None
