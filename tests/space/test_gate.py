"""What stands before every request: whose page asks, what is open, what a body may carry."""

import json
import re
from pathlib import Path

import httpx
import pytest
from gradio_client import Client
from playwright.sync_api import Browser, expect
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from loopback_hub import LoopbackHub
from space.gate import MAX_BODY_BYTES, Doorway, Limits, Origins, address_with
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


async def echo(request: Request) -> PlainTextResponse:
    """Answer with the number of bytes."""
    return PlainTextResponse(str(len(await request.body())))


def behind(*middleware: type) -> TestClient:
    """Ask a server of which every path answers, behind some of the gate."""
    routes = [Route("/{path:path}", echo, methods=["GET", "POST"])]
    app = Starlette(routes=routes, middleware=[Middleware(each) for each in middleware])
    return TestClient(app, base_url=HERE)


@pytest.mark.parametrize(
    "origin", ["https://evil.example", "http://127.0.0.1:8888", "null", "http://localhost:7860", ""]
)
def test_a_page_from_elsewhere_is_refused(monkeypatch, origin):
    """Another site's page, and another server's on this machine, may not ask, by no method."""
    monkeypatch.setenv("SPACE_HOST", "me-space.hf.space")
    server = behind(Origins)

    asked = [server.get("/", headers={"Origin": origin})]
    asked += [
        server.post("/x", headers={"Origin": origin}),
        server.options("/x", headers={"Origin": origin}),
    ]

    assert [answer.status_code for answer in asked] == [403, 403, 403]
    assert not [name for answer in asked for name in answer.headers if name.startswith("access-")]


def test_the_spaces_own_page_and_programs_may_ask(monkeypatch):
    """An origin is right if it is the host that was asked or the Space's; a program has none."""
    monkeypatch.setenv("SPACE_HOST", "me-space.hf.space")
    server = behind(Origins)

    own = [{"Origin": HERE}, {"Origin": "https://me-space.hf.space"}, {}]

    assert [server.post("/x", headers=headers).status_code for headers in own] == [200] * 3


def test_a_body_has_a_limit():
    """A recipe passes; more than the limit does not, whether its length is declared or not."""
    limited, path = behind(Limits), "/gradio_api/queue/join"
    longest = b'"' + b"x" * (MAX_BODY_BYTES - 2) + b'"'

    assert limited.post(path, content=longest).text == str(MAX_BODY_BYTES)
    assert limited.post(path, content=longest + b" ").status_code == 413
    assert limited.post(path, content=iter([longest, b" "])).status_code == 413


FILE = {"path": "http://127.0.0.1/x", "meta": {"_type": "gradio.FileData"}}


@pytest.mark.parametrize(
    "path", ["call/plan", "call/v2/plan", "run/plan", "api/plan", "queue/join", "mcp/"]
)
@pytest.mark.parametrize(
    "body",
    [
        FILE,
        {"data": [{"base_model": FILE}]},
        {"recipe": {"models": [{"model": [[FILE]]}]}},
        {"path": "x", "meta": {}},
        {"a": {"_type": "gradio.FileData"}},
    ],
)
def test_a_file_is_refused_wherever_it_stands(path, body):
    """Gradio would fetch or copy it before any endpoint is asked: no body that holds one passes."""
    limited = behind(Limits)
    text = json.dumps(body)

    written = [text, text.replace("_type", "\\u005ftype"), text.encode("utf-16")]

    # In UTF-16 it is no JSON here.
    for content, code in zip(written, (403, 403, 400), strict=True):
        assert limited.post(f"/gradio_api/{path}", content=content).status_code == code


@pytest.mark.parametrize("body", [b"{", b"\xff\xfe", b"[" * 200_000, b"1" * 5000, b"a=b"])
def test_what_is_no_json_is_refused(body):
    """Nothing behind the gate has to guess what a body is."""
    assert behind(Limits).post("/gradio_api/queue/join", content=body).status_code == 400


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/gradio_api/upload"),
        ("POST", "/gradio_api/process_recording"),
        ("POST", "/gradio_api/component_server"),
        ("POST", "/gradio_api/stream/x"),
        ("POST", "/gradio_api/vibe-edit/"),
        ("POST", "/login"),
        ("GET", "/gradio_api/deep_link"),
        ("GET", "/gradio_api/file=/etc/passwd"),
        ("GET", "/gradio_api/file/x"),
        ("GET", "/gradio_api/proxy=https://evil.example/x"),
        ("GET", "/monitoring"),
        ("GET", "/gradio_api/dev/reload"),
        ("GET", "/gradio_api/../monitoring"),
    ],
)
def test_what_this_app_does_not_need_is_closed(method, path):
    """Gradio's uploads, recordings, proxy, links and caches answer to nobody."""
    assert behind(Limits).request(method, path).status_code == 404


def test_every_open_path_is_one_that_gradio_or_this_app_has():
    """The list of what is open names nothing that no longer exists, and not what stores files."""
    import gradio.routes

    source = Path(gradio.routes.__file__).read_text()

    for name in ("startup-events", "queue/data", "queue/join", "heartbeat", "theme.css", "app_id"):
        assert f'"/{name}' in source


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
