"""Nobody starves the Space: turns, the queue, what a request may carry, what a plan may take."""

import os
import subprocess
import threading
from types import SimpleNamespace

import pytest
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from resmerge_stream.errors import RecipeError
from space.asked import web_request
from space.examples import examples
from space.identity import Visitor, address_of
from space.jobs import downloads, planning
from space.jobs.jobs import Jobs
from space.jobs.planning import Planners, Turns
from space.limits import MAX_BODY_BYTES, Limits
from space.settings import Settings
from tests.support.space_runs import wait_for


def test_whoever_asks_often_waits_behind_others():
    """While one visitor's requests wait, another's is served next, and nobody has two turns."""
    turns, served, first = Turns(2), [], threading.Event()
    holding = threading.Event()

    def ask(who, event):
        with turns.turn(who):
            served.append(who)
            holding.set()
            event.wait(30)

    greedy = [threading.Thread(target=ask, args=("greedy", first)) for _ in range(4)]
    for thread in greedy:
        thread.start()
    assert holding.wait(30)
    other = threading.Thread(target=ask, args=("other", first))
    other.start()
    wait_for(lambda: "other" in served, "the other's turn")

    assert served == ["greedy", "other"]
    first.set()
    for thread in [*greedy, other]:
        thread.join(30)
    assert served == ["greedy", "other", "greedy", "greedy", "greedy"]


def test_who_has_many_waiting_hears_that_it_is_busy():
    """A fifth request of one visitor is refused at once, and takes no place."""
    turns, end = Turns(1), threading.Event()
    started = threading.Barrier(2)

    def hold():
        with turns.turn("a"):
            started.wait(30)
            end.wait(30)

    def wait():
        with turns.turn("a"):
            pass

    threads = [threading.Thread(target=hold)]
    threads[0].start()
    started.wait(30)
    threads += [threading.Thread(target=wait) for _ in range(4)]
    for thread in threads[1:]:
        thread.start()
    wait_for(lambda: len(turns._waiting) == 4, "four to wait")

    with pytest.raises(RecipeError, match="busy"), turns.turn("a"):
        pass
    end.set()
    for thread in threads:
        thread.join(30)


@pytest.fixture
def queue(tmp_path, monkeypatch):
    """Jobs that only wait: no runner takes any."""
    jobs = Jobs(Settings(folder=tmp_path))
    monkeypatch.setattr(jobs, "_start_runners", lambda: None)
    return jobs


def submit(jobs, owner="", address=""):
    """Queue the built-in example for somebody."""
    asked = web_request({"recipe": examples()[0].recipe}, jobs.settings)
    return jobs.submit(asked, owner=owner, key="", token=None, address=address)


def test_accounts_come_first_and_everybodys_first_job_before_a_second(queue):
    """The place that a job is told is the order of service."""
    guest = submit(queue, address="192.0.2.1")
    alice = [submit(queue, "alice") for _ in range(3)]
    bob = submit(queue, "bob")

    order = [alice[0], bob, alice[1], alice[2], guest]

    assert [queue.place(job) for job in order] == [0, 1, 2, 3, 4]


def test_an_address_without_an_account_has_one_place(queue):
    """A second job from the same address is refused until the first is over; others may go on."""
    first = submit(queue, address="192.0.2.1")
    submit(queue, address="192.0.2.2")

    with pytest.raises(RecipeError, match="of yours is queued"):
        submit(queue, address="192.0.2.1")
    queue.cancel(first)
    submit(queue, address="192.0.2.1")


@pytest.mark.parametrize(
    ("forwarded", "address"),
    [
        ("", "10.0.0.1"),
        ("8.8.8.8", "8.8.8.8"),
        ("1.1.1.1, 8.8.8.8", "8.8.8.8"),
        ("8.8.8.8, 10.0.0.9", "8.8.8.8"),
        ("nonsense", "10.0.0.1"),
        ("2a00:1450:4001:81b::200e", "2a00:1450:4001:81b::"),
    ],
)
def test_an_address_is_what_the_proxy_says(monkeypatch, forwarded, address):
    """What a visitor writes into the header stands before what the proxy adds, and is ignored."""
    monkeypatch.setenv("SPACE_ID", "me/space")
    client = SimpleNamespace(host="10.0.0.1")

    asking = SimpleNamespace(client=client, headers={"x-forwarded-for": forwarded})

    assert address_of(asking) == address


async def echo(request: Request) -> PlainTextResponse:
    """Answer with the number of bytes."""
    return PlainTextResponse(str(len(await request.body())))


@pytest.fixture
def limited():
    """Ask a server behind the limits."""
    routes = [
        Route(path, echo, methods=["POST"])
        for path in ("/gradio_api/queue/join", "/gradio_api/upload")
    ]
    return TestClient(Starlette(routes=routes, middleware=[Middleware(Limits)]))


def test_a_body_has_a_limit(limited):
    """A recipe passes; more than the limit does not, whether its length is declared or not."""
    path = "/gradio_api/queue/join"

    assert limited.post(path, content=b"x" * MAX_BODY_BYTES).status_code == 200
    assert limited.post(path, content=b"x" * (MAX_BODY_BYTES + 1)).status_code == 413
    parts = iter([b"x" * MAX_BODY_BYTES, b"x"])
    assert limited.post(path, content=parts).status_code == 413


def test_uploads_are_closed(limited):
    """A single byte is refused: nothing here takes files."""
    assert limited.post("/gradio_api/upload", content=b"x").status_code == 403


def test_a_plan_that_takes_too_long_is_ended(tmp_path, monkeypatch):
    """Its process is killed, the visitor hears why, and the next plan is made by another."""
    planners = Planners(Settings(folder=tmp_path, plan_seconds=3))
    stuck = subprocess.Popen(
        ["sleep", "60"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    monkeypatch.setattr(planning, "start_worker", lambda settings, module: stuck)
    asked = web_request({"recipe": examples()[0].recipe}, planners._settings)

    with pytest.raises(RecipeError, match="took more than 3 s"):
        planners.plan(asked, Visitor(), "192.0.2.1")

    assert stuck.poll() is not None
    assert planners._idle == []
    planners.close()


def test_copies_of_servers_that_have_ended_are_removed(tmp_path, monkeypatch):
    """At the start those of the dead go, those of the living stay; at the end one's own goes."""
    monkeypatch.setattr(downloads.tempfile, "gettempdir", lambda: str(tmp_path))
    ended = subprocess.Popen(["true"])
    ended.wait()
    dead, alive = (tmp_path / f"resmerge-space-{pid}" for pid in (ended.pid, os.getpid()))
    for folder in (dead, alive):
        folder.mkdir()

    downloads.remove_downloads()
    assert [dead.exists(), alive.exists()] == [False, True]
    downloads.remove_downloads(mine=True)
    assert not alive.exists()


def test_a_record_says_nothing_of_an_address(queue, tmp_path):
    """Where a visitor comes from is in no file."""
    submit(queue, address="192.0.2.77")

    written = [path.read_text() for path in tmp_path.rglob("*.json")]
    assert written
    assert not [text for text in written if "192.0.2.77" in text]
