"""Signing in at the loopback Hub, by the client library that gradio's login uses."""

import asyncio
import re
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import httpx2
import pytest
from authlib.integrations.httpx_client import AsyncOAuth2Client
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError
from joserfc import jwt
from joserfc.jwk import KeySet

from loopback_hub import LoopbackHub, oidc

CALLBACK = "http://127.0.0.1:7860/login/callback?_target_url=%2F"


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[LoopbackHub]:
    """A running Hub with the users alice and bob."""
    with LoopbackHub(tmp_path / "hub") as running:
        running.add_user("alice", "hf_alice")
        running.add_user("bob", "hf_bob")
        yield running


def sign_in(hub: LoopbackHub, user: str = "alice", scopes: str = oidc.SCOPES) -> dict:
    """Go the whole way: discovery, consent, code, token; return the app's answer."""
    found = httpx2.get(f"{hub.endpoint}/.well-known/openid-configuration").json()

    async def go() -> dict:
        async with AsyncOAuth2Client(
            oidc.CLIENT_ID, oidc.CLIENT_SECRET, scope=scopes, redirect_uri=CALLBACK
        ) as app:
            url, state = app.create_authorization_url(found["authorization_endpoint"], nonce="n1")
            page = httpx2.get(url).text
            link = re.search(rf'href="([^"]*user={user})"', page)
            assert link is not None
            answer = httpx2.get(hub.endpoint + link[1].replace("&amp;", "&"))
            return await app.fetch_token(
                found["token_endpoint"],
                authorization_response=answer.headers["location"],
                state=state,
            )

    return dict(asyncio.run(go()))


def test_a_sign_in_gives_a_token_of_this_hub(hub: LoopbackHub) -> None:
    """The app's token is accepted by the Hub's API as the user's, and says when it ends."""
    answer = sign_in(hub)

    me = HfApi(endpoint=hub.endpoint, token=answer["access_token"]).whoami()
    assert (me["name"], me["auth"]["type"]) == ("alice", "oauth")
    assert me["auth"]["expiresAt"].endswith("Z")
    assert answer["scope"] == oidc.SCOPES


def test_the_statement_is_signed_and_carries_the_nonce(hub: LoopbackHub) -> None:
    """The id token checks against the published keys and repeats what the app sent."""
    keys = KeySet.import_key_set(httpx2.get(f"{hub.endpoint}/oauth/jwks").json())

    statement = jwt.decode(sign_in(hub)["id_token"], keys, algorithms=["RS256"])

    claims = statement.claims
    assert (claims["preferred_username"], claims["nonce"]) == ("alice", "n1")
    assert (claims["iss"], claims["aud"]) == (hub.endpoint, oidc.CLIENT_ID)


def test_userinfo_says_who_and_where(hub: LoopbackHub) -> None:
    """A user's organisations come with their name."""
    hub.add_org("lab", {"alice": "write"})
    token = hub.add_app_token("alice")

    answer = httpx2.get(
        f"{hub.endpoint}/oauth/userinfo", headers={"Authorization": f"Bearer {token}"}
    ).json()

    assert answer["preferred_username"] == "alice"
    assert [org["preferred_username"] for org in answer["orgs"]] == ["lab"]


def test_declining_gives_no_code(hub: LoopbackHub) -> None:
    """Somebody who is not a user of the Hub comes back with an error and without a code."""
    answer = httpx2.get(
        f"{hub.endpoint}/oauth/authorize",
        params={"client_id": oidc.CLIENT_ID, "response_type": "code", "redirect_uri": CALLBACK,
                "state": "s", "user": ""},
    )  # fmt: skip

    query = parse_qs(urlsplit(answer.headers["location"]).query)
    assert (query["error"], query["state"]) == (["access_denied"], ["s"])
    assert "code" not in query


@pytest.mark.parametrize(
    "wrong", [{"client_secret": "guess"}, {"code": "guess"}, {"redirect_uri": "http://127.0.0.1/"}]
)
def test_a_code_is_for_one_app_and_one_use(hub: LoopbackHub, wrong: dict[str, str]) -> None:
    """A wrong secret, code or callback gets no token; nor does a code that was used."""
    answer = httpx2.get(
        f"{hub.endpoint}/oauth/authorize",
        params={"client_id": oidc.CLIENT_ID, "response_type": "code", "redirect_uri": CALLBACK,
                "user": "alice"},
    )  # fmt: skip
    code = parse_qs(urlsplit(answer.headers["location"]).query)["code"][0]
    form = {"client_id": oidc.CLIENT_ID, "client_secret": oidc.CLIENT_SECRET, "code": code,
            "redirect_uri": CALLBACK}  # fmt: skip

    refused = httpx2.post(f"{hub.endpoint}/oauth/token", data=form | wrong)
    first = httpx2.post(f"{hub.endpoint}/oauth/token", data=form)
    second = httpx2.post(f"{hub.endpoint}/oauth/token", data=form)

    assert refused.status_code in (400, 401)
    # A wrong callback uses the code up.
    assert first.status_code == (400 if "redirect_uri" in wrong else 200)
    assert second.status_code == 400


def test_an_answer_goes_to_this_machine_only(hub: LoopbackHub) -> None:
    """A callback elsewhere is refused before anybody is asked."""
    answer = httpx2.get(
        f"{hub.endpoint}/oauth/authorize",
        params={"client_id": oidc.CLIENT_ID, "response_type": "code",
                "redirect_uri": "https://example.org/login/callback"},
    )  # fmt: skip

    assert answer.status_code == 400


def test_a_token_may_do_what_its_scopes_say(hub: LoopbackHub) -> None:
    """contribute-repos writes only what the app made, and private ones need read-repos."""
    hub.add_repo("alice/private", {"config.json": "{}"}, private=True)
    api = HfApi(endpoint=hub.endpoint, token=hub.add_app_token("alice", "openid contribute-repos"))
    again = HfApi(endpoint=hub.endpoint, token=hub.add_app_token("alice", "contribute-repos"))

    with pytest.raises(RepositoryNotFoundError):
        api.model_info("alice/private")
    api.create_repo("alice/made", private=True)
    again.create_branch("alice/made", branch="staging")  # the app's, whichever sign-in made it
    reader = HfApi(endpoint=hub.endpoint, token=hub.add_app_token("alice", "read-repos"))
    assert reader.model_info("alice/private").private
    with pytest.raises(HfHubHTTPError, match="403"):
        reader.create_repo("alice/other")


def test_gated_files_need_their_scope(hub: LoopbackHub, tmp_path: Path) -> None:
    """A grant to the user is of use to an app only with gated-repos."""
    hub.add_repo("alice/gated", {"config.json": "{}"}, gated="auto")
    hub.grant("alice/gated", "bob")
    plain, gated = hub.add_app_token("bob", "openid"), hub.add_app_token("bob", "gated-repos")

    with pytest.raises(HfHubHTTPError, match="403"):
        HfApi(endpoint=hub.endpoint, token=plain).auth_check("alice/gated")
    HfApi(endpoint=hub.endpoint, token=gated).auth_check("alice/gated")


def test_a_token_ends(hub: LoopbackHub) -> None:
    """After its lifetime the Hub does not know a token any more."""
    token = hub.add_app_token("alice", lifetime=-1.0)

    with pytest.raises(HfHubHTTPError, match="Invalid user token"):
        HfApi(endpoint=hub.endpoint, token=token).whoami()
