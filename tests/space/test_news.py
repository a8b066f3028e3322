"""News of a job over the route that watching pages ask, with a session as the sign-in leaves it."""

import time

import pytest
from starlette.applications import Starlette
from starlette.testclient import TestClient

from space.jobs.records import new_job
from space.page.news import News


@pytest.fixture
def ask(service):
    """Ask for news of a job, as somebody who is signed in with a token."""
    app = Starlette(routes=[News(service).route()])

    def asked(job, token=None, *, lasts_s=60.0, **shown):
        async def signed_in(scope, receive, send):
            info = {"access_token": token, "expires_at": time.time() + lasts_s}
            scope["session"] = {"oauth_info": info} if token else {}
            await app(scope, receive, send)

        return TestClient(signed_in).get(f"/news/{job}", params=shown)

    return asked


def put(service, owner=""):
    """Return a running job that nobody works on."""
    job = new_job({"recipe": {"base_model": "o/b", "models": ["o/e"]}, "push_to": "o/m"}, owner, "")
    job.state = "running"
    job.say("started")
    service.jobs._jobs[job.id] = job
    return job


def test_only_what_a_page_does_not_show_is_sent(service, ask):
    """State and progress always come; the log and the picture when a page shows others."""
    job = put(service)
    first = ask(job.id).json()
    assert {"state", "status", "log", "gates"} <= set(first)
    stamps = {"log": first["log_stamp"], "picture": first["gates_stamp"]}

    again = ask(job.id, **stamps).json()
    assert set(again) == {"state", "status", "log_stamp", "gates_stamp"}

    job.say("file 1 of 2 finished")
    later = ask(job.id, **stamps).json()
    assert later["log"].endswith("file 1 of 2 finished")
    assert "gates" not in later


def test_news_of_a_job_is_its_owners(service, ask):
    """Somebody else, nobody, and an owner whose sign-in has ended learn nothing."""
    job = put(service, owner="alice")

    assert ask(job.id, "t-alice").json()["state"] == "running"
    for answer in (ask(job.id), ask(job.id, "t-bob"), ask(job.id, "t-alice", lasts_s=-1.0)):
        assert answer.status_code == 404
        assert answer.json() == {}


def test_what_there_is_not_is_not_found(ask):
    """An id that no job has gets the answer that another's job gets."""
    answer = ask("nothing")

    assert (answer.status_code, answer.json()) == (404, {})


def test_news_are_not_kept_by_caches(service, ask):
    """Between the Space and a browser nobody keeps an answer."""
    assert ask(put(service).id).headers["cache-control"] == "no-store"
