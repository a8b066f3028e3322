"""What strangers must not get from the Space: files, tokens, jobs of others, its owner's rights."""

import io
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest
from gradio_client.exceptions import AppError

from tests.support.space_pages import Visit
from tests.support.space_runs import (
    ROOT,
    Town,
    client_of,
    ended,
    recipe,
    status,
    wait_for,
)

RUNNING = ("queued", "planning", "running")
PATHS = ("/etc", "/etc/passwd", "../group", "./base", "~/models", "file:///etc", "a/b/c", ".")


@pytest.mark.parametrize("size", [10_000, 3_000_000])
def test_nothing_can_be_uploaded(town: Town, size: int) -> None:
    """The app takes no files, so the upload route that gradio always has is closed."""
    answer = httpx.post(
        f"{town.space.url}/gradio_api/upload",
        files={"files": ("x.bin", io.BytesIO(b"x" * size))},
    )

    assert answer.status_code in (403, 404, 405, 413)


def test_no_file_of_the_server_can_be_read(town: Town) -> None:
    """The file route gives neither system files nor the app's source, records or a URL."""
    log = town.space.log
    names = ["/etc/passwd", str(ROOT / "app.py"), str(log), f"{town.hub.endpoint}/alice/base"]

    for name in names:
        answer = httpx.get(f"{town.space.url}/gradio_api/file={name}")

        assert answer.status_code in (403, 404), name


@pytest.mark.slow
@pytest.mark.parametrize("path", PATHS)
def test_no_endpoint_takes_a_path(town: Town, path: str) -> None:
    """A path in place of an id is refused wherever an id is taken, whether or not it exists."""
    with client_of(town, town.alice) as client:
        as_base = client.predict(recipe=recipe() | {"base_model": path}, api_name="/plan")
        as_expert = client.predict(
            recipe=recipe() | {"models": [{"model": path}]}, api_name="/plan"
        )
        with pytest.raises(AppError):
            client.predict(recipe=recipe() | {"base_model": path}, push_to="alice/x", private=True,
                           api_name="/merge")  # fmt: skip
        with pytest.raises(AppError):
            client.predict(recipe=recipe(), push_to=path, private=True, api_name="/merge")
        with pytest.raises(AppError):
            client.predict(job_or_repo=path, api_name="/report")

    for plan in (as_base, as_expert):
        assert plan["refused"] is True
        assert "not found in" not in json.dumps(plan)
        assert "No such file" not in json.dumps(plan)


def everything(folder: Path) -> Iterator[tuple[Path, bytes]]:
    """Every file below a folder with its content."""
    for path in folder.rglob("*"):
        if path.is_file():
            yield path, path.read_bytes()


@pytest.mark.slow
def test_a_token_is_written_nowhere(town: Town) -> None:
    """After a merge and a failed one, a token is in no file, log, page, answer or command line."""
    token = town.hub.add_app_token("alice")
    with client_of(town, token) as client:
        job = client.predict(
            recipe=recipe(), push_to="alice/secretive", private=True, api_name="/merge"
        )["job"]
        assert ended(client, job)["state"] == "done"
        town.hub.revoke_token(token)
        plan = client.predict(recipe=recipe(), api_name="/plan")
        answers = [plan, httpx.get(f"{town.space.url}/?job={job}").text]
        answers.append(httpx.get(f"{town.space.url}/config").text)

    secret = token.encode()
    assert not [path for path, content in everything(town.space.folder) if secret in content]
    assert token not in json.dumps(answers)
    repo = "alice/secretive"
    assert not [name for name in town.hub.files(repo) if secret in town.hub.read(repo, name)]
    assert town.space.process is not None
    assert secret not in Path(f"/proc/{town.space.process.pid}/cmdline").read_bytes()


@pytest.mark.slow
def test_the_owners_secret_serves_no_visitor(lone_town: Town) -> None:
    """HF_TOKEN of a public Space reads nothing for others: not in a plan, a merge or a search."""
    town = lone_town
    town.space.stop()
    town.space.extra = {"HF_TOKEN": town.alice}
    town.space.start()
    town.hub.log.clear()

    for token in (None, town.bob):
        with client_of(town, token) as client:
            plan = client.predict(recipe=recipe(), api_name="/plan")
            with pytest.raises(AppError):
                client.predict(job_or_repo="alice/expert0", api_name="/report")
        assert plan["refused"] is True

    # It asks only whether the Space itself is private, and then it would serve.
    asked = {entry.path for entry in town.hub.log if entry.user == "alice"}
    assert asked <= {"/api/spaces/alice/space"}
    secret = town.alice.encode()
    assert not [p for p, content in everything(town.space.folder) if secret in content]


@pytest.mark.slow
def test_a_killed_space_shows_the_job_as_resumable(lone_town: Town) -> None:
    """After SIGKILL in a merge the job is there, resumable, and continues to the same bytes."""
    town = lone_town
    with client_of(town, town.alice) as client, town.held("alice/survivor", lost=True) as hold:
        job = client.predict(
            recipe=recipe(), push_to="alice/survivor", private=True, api_name="/merge"
        )["job"]
        wait_for(lambda: hold.hits, "the merge to stand still")
        town.space.restart()
    with client_of(town, town.alice) as client:
        found = status(client, job)
        with client_of(town, town.bob) as bob, pytest.raises(AppError):
            status(bob, job)
        again = client.predict(
            recipe=recipe(), push_to="alice/survivor", private=True, api_name="/merge"
        )["job"]
        last = ended(client, again)

    assert found["state"] == "resumable"
    assert last["state"] == "done", last
    assert town.published("alice/survivor").keys() >= {"config.json"}


def test_a_token_that_ends_leaves_a_resumable_job(town: Town) -> None:
    """When the Hub stops accepting the token, the job waits for its owner and says so."""
    token = town.hub.add_app_token("alice")
    with client_of(town, token) as client, town.held("alice/expired") as hold:
        job = client.predict(
            recipe=recipe(), push_to="alice/expired", private=True, api_name="/merge"
        )["job"]
        wait_for(lambda: hold.hits, "the merge to stand still")
        town.hub.revoke_token(token)
    with client_of(town, town.alice) as later:
        last = ended(later, job)

    assert last["state"] == "resumable", last
    assert "sign in" in last["message"].lower()


_ATTACK = """
<script>
const recipe = {base_model: "built-in/base", models: ["built-in/rl-add"]};
const body = {recipe, push_to: "alice/stolen"};
const ask = (mode, type) => fetch("%s/gradio_api/call/v2/merge", {
  method: "POST", credentials: "include", mode, headers: {"content-type": type},
  body: JSON.stringify(body)}).then((answer) => answer.type + answer.status, () => "refused");
Promise.all([ask("no-cors", "text/plain"), ask("cors", "application/json")]).then(
  (answers) => { document.title = answers.join(" ") });
</script>
"""


@contextmanager
def elsewhere(page: str) -> Iterator[str]:
    """Another site, as a browser sees it: the same machine under another name."""

    class Page(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("content-type", "text/html")
            self.end_headers()
            self.wfile.write(page.encode())

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Page)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://localhost:{server.server_port}/"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.slow
def test_another_sites_page_does_nothing_in_a_visitors_name(
    visit: Callable[..., Visit], town: Town
) -> None:
    """A page elsewhere asks with a visitor's cookies, as some browsers allow: nothing starts."""
    alice = visit("alice")
    cookies = alice.page.context.cookies()
    # As a browser that allows third-party cookies has them.
    alice.page.context.add_cookies([{**one, "sameSite": "None", "secure": True} for one in cookies])
    evil = alice.page.context.new_page()
    evil.route(lambda url: url.startswith("http://localhost:"), lambda route: route.continue_())

    with elsewhere(_ATTACK % town.space.url) as address:
        evil.goto(address)
        evil.wait_for_function("document.title != ''")

    jar = {one["name"]: one["value"] for one in cookies}
    asked = httpx.post(
        f"{town.space.url}/gradio_api/call/v2/merge",
        json={"recipe": recipe(), "push_to": "alice/stolen"},
        headers={"origin": "https://evil.example"},
        cookies=jar,
    )
    assert asked.status_code == 403
    # Whether its page may read the answer or not: what it reads is that it was refused.
    assert evil.title() == "opaque0 cors403"
    with client_of(town, town.alice) as client:
        assert "alice/stolen" not in [job["push_to"] for job in client.predict(api_name="/jobs")]
