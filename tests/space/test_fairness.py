"""Nobody starves the Space: the queue, an address's place in it, limits of time and of results."""

import subprocess
import sys
from types import SimpleNamespace

import pytest

from resmerge_stream.errors import RecipeError
from space.asked import web_request
from space.examples import examples
from space.identity import address_of
from space.jobs.jobs import Jobs
from space.jobs.records import DONE, RESUMABLE
from space.settings import Settings
from tests.support.space_runs import wait_for


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


def test_results_together_have_a_limit(tmp_path, monkeypatch):
    """Beyond it the oldest finished go first; what waits or runs keeps its own."""
    jobs = Jobs(Settings(folder=tmp_path, result_bytes=2500))
    monkeypatch.setattr(jobs, "_start_runners", lambda: None)
    made = [submit(jobs, owner=f"visitor{n}") for n in range(4)]
    for number, job in enumerate(made):
        jobs.result(job).mkdir(parents=True)
        (jobs.result(job) / "model.safetensors").write_bytes(b"x" * 1000)
        job.updated = float(number)
        if number:
            job.state = DONE

    jobs._make_room(made)

    assert [jobs.result(job).exists() for job in made] == [True, False, True, True]


@pytest.mark.parametrize("owner", ["", "alice"])
def test_a_merge_has_a_limit_of_time(tmp_path, monkeypatch, owner):
    """A merge that takes longer is stopped, its job says how long it may take, and it can go on."""
    seconds = {"merge_seconds": 0.2, "anonymous_merge_seconds": 0.2}
    jobs = Jobs(Settings(folder=tmp_path, **seconds))
    code = "import sys; sys.stdin.read()"

    def start(settings):
        return subprocess.Popen(
            [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    monkeypatch.setattr("space.jobs.jobs.start_worker", start)
    job = submit(jobs, owner=owner)

    wait_for(lambda: job.state == RESUMABLE, "the merge to be stopped")
    assert "may take 0 min" in job.message
    jobs.close()


def test_a_record_says_nothing_of_an_address(queue, tmp_path):
    """Where a visitor comes from is in no file."""
    submit(queue, address="192.0.2.77")

    written = [path.read_text() for path in tmp_path.rglob("*.json")]
    assert written
    assert not [text for text in written if "192.0.2.77" in text]
