"""Who gets in where the Space runs on somebody's own machine."""

import re
from pathlib import Path

import httpx
import pytest
from gradio_client import Client
from playwright.sync_api import Browser, expect
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from space.doorway import Doorway, address_with
from tests.loopback_hub import LoopbackHub
from tests.support.space_runs import Space

HERE = "http://127.0.0.1:7860"


@pytest.fixture(params=[True, False], ids=["login", "no login"])
def inside(request):
    """Ask a server behind the doorway, as a browser that has not been here before."""

    def page(_):
        return PlainTextResponse("in")

    app = Doorway(Starlette(routes=[Route("/", page)]), "secret", lambda: request.param)
    client = TestClient(app, base_url=HERE)
    if request.param:
        client.headers["x-resmerge-key"] = "secret"
    return client


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:7860", "127.0.0.1.evil.example", ""]
)
def test_another_name_for_this_machine_is_refused(inside, host):
    """A site that lets its own name point here (DNS rebinding) gets nothing, key or not."""
    assert inside.get("/", headers={"Host": host}).status_code == 403


@pytest.mark.parametrize(
    "origin", ["https://evil.example", "http://127.0.0.1:8888", "null", "http://localhost:7860"]
)
def test_a_page_from_elsewhere_is_refused(inside, origin):
    """Another site's page, and another server's on this machine, may not ask."""
    assert inside.get("/", headers={"Origin": origin}).status_code == 403
    assert inside.get("/", headers={"Origin": HERE}).text == "in"


def test_the_printed_address_lets_a_browser_in():
    """Its key becomes a cookie that no script reads, and is gone from the address."""
    app = Doorway(Starlette(routes=[Route("/", lambda _: PlainTextResponse("in"))]), "k", bool)
    locked = Doorway(app, "k", lambda: True)
    browser = TestClient(locked, base_url=HERE, follow_redirects=False)

    assert browser.get("/").status_code == 401
    assert browser.get("/?key=other").status_code == 401
    first = browser.get(address_with("/", "k"))

    assert (first.status_code, first.headers["location"]) == (303, "/")
    assert "HttpOnly" in first.headers["set-cookie"]
    assert "SameSite=strict" in first.headers["set-cookie"]
    assert browser.get("/").text == "in"


@pytest.mark.slow
def test_at_home_the_owners_login_is_for_who_has_the_address(
    tmp_path: Path, browser: Browser
) -> None:
    """The started app prints one address; a browser and a program get in with it, nobody else."""
    with LoopbackHub(tmp_path / "hub") as hub:
        token = hub.add_user("alice")
        space = Space(hub, tmp_path / "space", extra={"HF_TOKEN": token}, in_space=False)
        try:
            space.start(locked=True)
            printed = re.findall(rf"{space.url}/\?key=(\S+)", space.log.read_text())
            assert len(printed) == 1
            key = printed[0]

            assert httpx.get(f"{space.url}/config").status_code == 401
            rebound = httpx.get(f"{space.url}/config?key={key}", headers={"Host": "evil.example"})
            assert rebound.status_code == 403
            page = browser.new_page()
            page.goto(f"{space.url}/?key={key}")
            expect(page.get_by_text("Signed in as alice").first).to_be_visible()
            expect(page.get_by_role("button", name="Plan")).to_be_visible()
            assert key not in page.url
            page.close()
            program = Client(space.url, headers={"x-resmerge-key": key}, verbose=False)
            assert program.predict(api_name="/methods")
            program.close()
        finally:
            space.stop()
