"""What strangers tried, one row a test: how much of the Space each may take. Nothing is timed."""

import asyncio
import json
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import psutil
import pytest

from resmerge_stream.errors import RecipeError, VerificationError
from space.asked import web_request
from space.examples import examples
from space.explore import MAX_ROWS, MAX_VALUES, OWN_BYTES, STRANGERS_BYTES, opened, report_in
from space.gate import A_SECOND, BURST, Pace
from space.identity import network_of
from space.jobs.jobs import Jobs
from space.jobs.planning import Turns
from space.settings import Settings
from space.view.report import compared_html, opened_html
from tests.support.hub_runs import ROOT
from tests.support.space_runs import Town, client_of, recipe, wait_for

BUILT_IN = {"base_model": "built-in/base", "models": ["built-in/rl-add", "built-in/rl-sort"]}


def call(town: Town, endpoint: str, headers: dict[str, str] | None = None, **body: Any) -> str:
    """Call an endpoint over plain HTTP, as a stranger's script does; return what it answers."""
    url = f"{town.space.url}/gradio_api/call/v2/{endpoint}"
    event = httpx.post(url, json=body, headers=headers, timeout=120).json()["event_id"]
    url = f"{town.space.url}/gradio_api/call/{endpoint}/{event}"
    return httpx.get(url, headers=headers, timeout=120).text


@pytest.mark.slow
def test_a_malformed_token_costs_the_hub_nothing(town: Town) -> None:
    """Forty calls with what can be no token: no request, no job, and a plan is made beside them."""
    town.hub.log.clear()
    with ThreadPoolExecutor(8) as pool:
        asked = [
            pool.submit(call, town, "plan", recipe=BUILT_IN, oauth_token=token)
            for token in ["x\n", "two words", "ü", "x" * 2000] * 10
        ]
        innocent = call(town, "plan", recipe=BUILT_IN)
        answers = [each.result() for each in asked]

    assert '"refused": false' in innocent
    assert all("error" in answer and '"refused"' not in answer for answer in answers)
    assert not town.hub.log.find(path="whoami")


def test_a_wrong_token_is_one_question(town: Town) -> None:
    """Twenty calls with a token that the Hub does not know, or revoked: it is asked once."""
    town.hub.log.clear()
    with ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(call, town, "jobs", oauth_token="hf_nobodys_token") for _ in range(20)]
        answers = [each.result() for each in asked]

    assert all("error" in answer for answer in answers)
    # The library asks once more where a token was refused, to tell an outage from a refusal.
    assert len(town.hub.log.find(path="whoami")) <= 2


def test_an_address_that_calls_without_a_pause_is_told_to_wait(monkeypatch) -> None:
    """Beyond a first burst a network gets so many calls a second, whatever addresses it has; others
    notice nothing, and who waits may call again."""
    monkeypatch.setenv("SPACE_ID", "me/space")
    now, passed = [0.0], []

    async def behind(scope: Any, receive: Any, send: Any) -> None:
        passed.append(scope["path"])

    pace = Pace(behind, clock=lambda: now[0])

    def ask(address: str, method: str = "POST", path: str = "/gradio_api/call/v2/plan") -> int:
        answers: list[dict[str, Any]] = []

        async def send(message: dict[str, Any]) -> None:
            answers.append(message)

        headers = [(b"x-forwarded-for", address.encode())]
        scope = {"type": "http", "method": method, "path": path,
                 "headers": headers, "client": ("10.0.0.1", 1)}  # fmt: skip
        asyncio.run(pace(scope, None, send))  # type: ignore[arg-type]
        return int(answers[0]["status"]) if answers else 200

    first = [ask(f"8.8.8.{n}") for n in range(BURST + 5)]
    assert first == [200] * BURST + [429] * 5
    assert (ask("1.1.1.1"), ask("127.0.0.1"), ask("8.8.8.8", "GET")) == (200, 200, 200)
    now[0] += 0.5
    later = [ask("8.8.8.8") for _ in range(10)]
    assert later == [200] * int(A_SECOND / 2) + [429] * (10 - int(A_SECOND / 2))
    now[0] += 0.5
    pages = [ask("8.8.8.8", "GET", "/") for _ in range(4)]
    assert pages == [200, 200, 429, 429]


def test_a_repository_of_headers_is_not_read(town: Town) -> None:
    """Its index says 40 MB of headers: the plan is refused, and a fraction of that was sent."""
    size = 40_000_000
    town.hub.add_repo("alice/headers", {
        "config.json": b'{"architectures": ["LlamaForCausalLM"], "model_type": "llama"}',
        "model.safetensors": size.to_bytes(8, "little") + b"{" + b" " * size,
    })  # fmt: skip
    town.hub.log.clear()

    with client_of(town) as client:
        plan = client.predict(
            recipe=recipe() | {"models": [{"model": "alice/headers"}]}, api_name="/plan"
        )

    assert plan["refused"]
    assert sum(entry.sent for entry in town.hub.log.find(path="headers")) < size / 2


def test_a_plan_has_a_limit_of_memory() -> None:
    """Its process cannot have what would take the server's."""
    script = (
        "from space.jobs.planner import main\nmain()\n"
        "try:\n    bytearray(2_000_000_000)\nexcept MemoryError:\n    print('refused')"
    )

    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True,
        text=True, check=True,
    )  # fmt: skip

    assert done.stdout.split() == ["refused"]


def submit(jobs: Jobs, address: str = "", owner: str = "") -> None:
    """Queue the built-in example for somebody."""
    asked = web_request({"recipe": examples()[0].recipe}, jobs.settings)
    jobs.submit(asked, owner=owner, key="", token=None, address=address)


@pytest.mark.parametrize("address", ["198.51.100.{}", "2001:db8:1:{}::"])
def test_a_network_holds_half_of_the_places_of_strangers(tmp_path, monkeypatch, address):
    """Whoever has many addresses is refused at the half; others still get in, accounts too."""
    jobs = Jobs(Settings(folder=tmp_path, anonymous_jobs=8))
    monkeypatch.setattr(jobs, "_start_runners", lambda: None)
    for number in range(4):
        submit(jobs, address.format(number))

    with pytest.raises(RecipeError, match="your network"):
        submit(jobs, address.format(9))
    submit(jobs, "192.0.2.1")
    submit(jobs, owner="alice")
    assert network_of("@alice") == "@alice"


def test_a_network_holds_half_of_the_places_to_plan():
    """From hundred addresses of one network, half of the waiting places are taken; not more."""
    turns, end = Turns(1), threading.Event()

    def ask(who: str) -> None:
        try:
            with turns.turn(who):
                end.wait(60)
        except RecipeError:
            refused.append(who)

    refused: list[str] = []
    threads = [threading.Thread(target=ask, args=(f"198.51.100.{n}",)) for n in range(100)]
    for thread in threads:
        thread.start()
    wait_for(lambda: len(refused) == 87, "all but one that runs and twelve that wait")
    others = [threading.Thread(target=ask, args=(who,)) for who in ("@alice", "192.0.2.1")]
    for thread in others:
        thread.start()
    wait_for(lambda: len(turns._waiting) == 14, "the others to wait beside them")

    end.set()
    for thread in [*threads, *others]:
        thread.join(60)
    assert len(refused) == 87


def report_of(count: int) -> bytes:
    """A stranger's report of so many tensors, each with every gate."""
    gates = {"S_H": 0.5, "c_R": 0.6, "c_R_floor": 0.5, "alpha_R": 0.8, "kept_norm": 1.0,
             "kept_cosine": 0.9, "changed_fraction": 0.4, "update_norm": 1.0}  # fmt: skip
    tensors = [
        {"name": f"model.layers.{n // 40}.part{n % 40}.weight", "role": "attention",
         "rule": "resmerge", "shape": [8, 8], "warnings": [], **gates}
        for n in range(count)
    ]  # fmt: skip
    return json.dumps(
        {"version": 1, "summary": {}, "files": [], "recipe": {}, "sources": [], "tensors": tensors}
    ).encode()


def test_a_large_report_makes_a_page_of_bounded_size():
    """Of 50,000 tensors a sample is drawn: no more nodes than a browser draws at once."""
    report = report_in(report_of(50_000), name="x/y", max_bytes=OWN_BYTES)
    shown = opened(report, name="x/y")

    assert len(shown.rows) <= MAX_ROWS
    html = opened_html(shown)
    assert html.count("<") < 60_000
    assert compared_html(shown, shown).count("<") < 60_000


def test_a_report_larger_than_any_is_refused():
    """It is not even parsed."""
    with pytest.raises(VerificationError, match="more than"):
        report_in(b"{" + b" " * OWN_BYTES, name="x/y", max_bytes=OWN_BYTES)


def test_a_report_that_grows_in_memory_is_refused():
    """Three bytes a value, each of which takes twenty times that: what counts is how many."""
    report = json.loads(report_of(1)) | {"x": [[]] * MAX_VALUES}
    data = json.dumps(report).encode()

    assert len(data) < STRANGERS_BYTES
    with pytest.raises(VerificationError, match="values"):
        report_in(data, name="x/y", max_bytes=STRANGERS_BYTES)


@pytest.mark.parametrize("nbytes", [STRANGERS_BYTES - 1000, STRANGERS_BYTES * 8])
def test_a_strangers_report_does_not_grow_the_server(town: Town, nbytes: int) -> None:
    """Endpoint, page and paste read it in another process: the server has what it had before."""
    report = json.loads(report_of(1)) | {"x": [[]] * (nbytes // 3 - 400)}
    data = json.dumps(report, separators=(",", ":")).encode()
    town.hub.add_repo(f"alice/grows-{nbytes}", {"config.json": b"{}", "resmerge/report.json": data})
    server = psutil.Process(town.space.process.pid)
    call(town, "plan", recipe=BUILT_IN)
    before = server.memory_info().rss

    answers = [call(town, "report", job_or_repo=f"alice/grows-{nbytes}") for _ in range(3)]

    assert all("error" in answer for answer in answers)
    assert server.memory_info().rss - before < 60_000_000
