"""Signing in to an app with an account of this Hub: OpenID Connect, as gradio's login wants it.

The consent page has one link a user of the Hub, no password. The token that the app gets is a
token of this Hub, with the scopes that the app asked for and an end.
"""

import base64
import html
import time
from collections.abc import Mapping
from typing import Any
from urllib.parse import parse_qs, unquote, urlencode, urlsplit

from starlette.responses import HTMLResponse, JSONResponse, RedirectResponse, Response

from .web import Call, HubError, Route, route

CLIENT_ID = "loopback-app"
CLIENT_SECRET = "loopback-app-secret"
SCOPES = (
    "openid profile contribute-repos gated-repos write-discussions write-collections read-repos"
)


def space_env(endpoint: str, space_id: str, scopes: str = SCOPES) -> dict[str, str]:
    """The environment in which a gradio app believes to be a Space that signs in here."""
    return {
        "SYSTEM": "spaces",
        "SPACE_ID": space_id,
        "OAUTH_CLIENT_ID": CLIENT_ID,
        "OAUTH_CLIENT_SECRET": CLIENT_SECRET,
        "OAUTH_SCOPES": scopes,
        "OPENID_PROVIDER_URL": endpoint,
    }


async def discovery(call: Call) -> Response:
    """Say where the other endpoints are."""
    here = call.hub.endpoint
    return JSONResponse(
        {
            "issuer": here,
            "authorization_endpoint": f"{here}/oauth/authorize",
            "token_endpoint": f"{here}/oauth/token",
            "userinfo_endpoint": f"{here}/oauth/userinfo",
            "jwks_uri": f"{here}/oauth/jwks",
            "response_types_supported": ["code"],
            "subject_types_supported": ["public"],
            "id_token_signing_alg_values_supported": ["RS256"],
            "scopes_supported": SCOPES.split(),
        }
    )


async def authorize(call: Call) -> Response:
    """Ask who signs in; with `user` in the query the answer was given, and the app gets a code."""
    query = dict(call.request.query_params)
    redirect_uri = query.get("redirect_uri", "")
    if query.get("client_id") != CLIENT_ID or query.get("response_type") != "code":
        raise HubError(400, "Unknown client_id, or response_type is not 'code'")
    if urlsplit(redirect_uri).hostname not in ("127.0.0.1", "localhost"):
        raise HubError(400, "redirect_uri is not on this machine")
    if "user" not in query:
        return HTMLResponse(_consent_page(call.hub.accounts.users(), query))
    answer = {"state": query.get("state", "")}
    if query["user"] not in call.hub.accounts.users():
        answer |= {"error": "access_denied", "error_description": "The user declined"}
    else:
        answer["code"] = call.hub.sign_ins.grant(
            query["user"],
            client_id=CLIENT_ID,
            redirect_uri=redirect_uri,
            scopes=tuple(query.get("scope", "").split()),
            nonce=query.get("nonce"),
        )
    joint = "&" if urlsplit(redirect_uri).query else "?"
    return RedirectResponse(f"{redirect_uri}{joint}{urlencode(answer)}", 302)


def _consent_page(users: list[str], query: Mapping[str, str]) -> str:
    def link(user: str, words: str) -> str:
        target = f"/oauth/authorize?{urlencode({**query, 'user': user})}"
        return f'<li><a href="{html.escape(target)}">{html.escape(words)}</a></li>'

    choices = [link(user, f"Sign in as {user}") for user in users] + [link("", "Decline")]
    scopes = html.escape(query.get("scope", ""))
    return (
        '<!doctype html><html lang="en"><title>Loopback Hub: sign in</title>'
        '<body style="font-family: sans-serif; margin: 3em"><h1>Loopback Hub</h1>'
        f"<p>An app asks for: <code>{scopes}</code></p><ul>{''.join(choices)}</ul></body></html>"
    )


async def token(call: Call) -> Response:
    """Exchange a code for a token of this Hub and a signed statement whose it is."""
    form = parse_qs((await call.request.body()).decode())
    wanted = {name: values[0] for name, values in form.items()}
    if _client(call, wanted) != (CLIENT_ID, CLIENT_SECRET):
        return JSONResponse({"error": "invalid_client"}, 401)
    granted = call.hub.sign_ins.redeem(wanted.get("code", ""))
    if granted is None or wanted.get("redirect_uri") != granted.redirect_uri:
        return JSONResponse({"error": "invalid_grant"}, 400)
    lifetime = call.hub.settings.sign_in_lifetime
    issued = int(time.time())
    claims = {
        **_person(call, granted.user),
        "iss": call.hub.endpoint,
        "aud": granted.client_id,
        "iat": issued,
        "exp": issued + 3600,
    }
    if granted.nonce is not None:
        claims["nonce"] = granted.nonce
    return JSONResponse(
        {
            "access_token": call.hub.accounts.add_app_token(
                granted.user, granted.client_id, granted.scopes, lifetime=lifetime
            ),
            "token_type": "bearer",
            "expires_in": int(lifetime),
            "scope": " ".join(granted.scopes),
            "id_token": call.hub.sign_ins.sign(claims),
        }
    )


def _client(call: Call, form: Mapping[str, str]) -> tuple[str, str]:
    kind, _, encoded = call.request.headers.get("authorization", "").partition(" ")
    if kind.lower() != "basic":
        return form.get("client_id", ""), form.get("client_secret", "")
    name, _, secret = base64.b64decode(encoded).decode().partition(":")
    return unquote(name), unquote(secret)


def _person(call: Call, user: str) -> dict[str, Any]:
    return {
        "sub": f"user-{user}",
        "name": user,
        "preferred_username": user,
        "profile": f"{call.hub.endpoint}/{user}",
        "picture": f"{call.hub.endpoint}/oauth/picture.svg",
        "isPro": False,
        "orgs": [
            {"sub": org["id"], "name": org["fullname"], "preferred_username": org["name"],
             "picture": "", "roleInOrg": org["roleInOrg"]}
            for org in call.hub.accounts.orgs_of(user)
        ],
    }  # fmt: skip


async def userinfo(call: Call) -> Response:
    """Say whose token came with the request, in OpenID's words."""
    return JSONResponse(_person(call, call.caller().user))


async def jwks(call: Call) -> Response:
    """Give the public key of the signed statements."""
    return JSONResponse(call.hub.sign_ins.public_keys())


async def picture(call: Call) -> Response:
    """Everybody's portrait."""
    drawing = (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 8 8">'
        '<rect width="8" height="8" fill="#ccc"/><circle cx="4" cy="3" r="1.5"/>'
        '<circle cx="4" cy="8" r="3"/></svg>'
    )
    return Response(drawing, media_type="image/svg+xml")


ROUTES: tuple[Route, ...] = (
    route("GET", "/.well-known/openid-configuration", discovery),
    route("GET", "/oauth/authorize", authorize),
    route("POST", "/oauth/token", token),
    route("GET", "/oauth/userinfo", userinfo),
    route("GET", "/oauth/jwks", jwks),
    route("GET", "/oauth/picture.svg", picture),
)
