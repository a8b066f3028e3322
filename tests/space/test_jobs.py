"""Jobs of the Space, as plain functions, with real merges in real processes."""

import io
import json
import subprocess
import sys
import threading
import time
import zipfile
from types import SimpleNamespace

import pytest
from starlette.applications import Starlette
from starlette.testclient import TestClient

import space.jobs.jobs
from loopback_hub import Hook, LoopbackHub
from resmerge_stream.errors import PublishError, RecipeError
from resmerge_stream.sinks.hub.leftovers import Unfinished
from space.asked import web_request
from space.examples import examples
from space.identity import Visitor, Visitors
from space.jobs.downloads import Downloads
from space.jobs.jobs import Jobs
from space.jobs.planning import Planners
from space.jobs.process import let_end
from space.jobs.records import ACTIVE, Records, new_job
from space.search import Search
from space.service import NO_JOB, Service
from space.settings import Settings
from tests.support.checkpoints import run_python
from tests.support.hub_runs import make_bench

PATIENCE_S = 180.0  # a busy machine is slow
BUILT_IN = {"recipe": {"base_model": examples()[0].base, "models": list(examples()[0].experts)}}
HUB = {
    "recipe": {"base_model": "alice/base", "models": ["alice/expert0", "alice/expert1"]},
    "public": False,
}


def ended(job):
    """Wait until a job is over, and return its state."""
    deadline = time.monotonic() + PATIENCE_S
    while job.state in ACTIVE:
        assert time.monotonic() < deadline, job.log
        time.sleep(0.02)
    return job.state


def until(condition):
    """Wait until something is so."""
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture
def jobs(tmp_path):
    """Jobs in an empty folder, stopped at the end."""
    made = Jobs(Settings(folder=tmp_path / "space", prompts=0, jobs_per_user=2, anonymous_jobs=2))
    yield made
    made.close()


@pytest.fixture(scope="module")
def town(tmp_path_factory):
    """A Hub with a group of models, of which the experts are alice's alone."""
    folder = tmp_path_factory.mktemp("town")
    with LoopbackHub(folder / "hub") as hub:
        bench = make_bench(folder, hub)
        yield bench
        bench.close()


@pytest.fixture
def on_hub(town, monkeypatch, tmp_path):
    """The same Hub for the processes of merges, without faults."""
    for name, value in town.hub.env(xet=False, home=tmp_path / "home").items():
        monkeypatch.setenv(name, value)
    yield town
    town.hub.faults.clear()


def asked(jobs, document, **more):
    """Return what a document asks for."""
    return web_request({**document, **more}, jobs.settings)


def test_a_merge_runs_by_itself_and_leaves_files(jobs):
    """The built-in example ends as a whole model with its report, and no path of this machine."""
    job = jobs.submit(asked(jobs, BUILT_IN), owner="", key="k", token=None)

    assert ended(job) == "done", job.log
    report = json.loads(jobs.report(job))
    files = Downloads(jobs)
    names = {file.name for file in files.of(job)}
    assert {"config.json", "README.md", "resmerge/report.json", "resmerge/recipe.yml"} <= names
    assert_all_arrive(jobs, job, files)
    assert any(name.endswith(".safetensors") for name in names)
    assert job.progress == 1.0
    assert job.tensors_done == len(report["tensors"]) == len(jobs.live(job).rows)
    assert job.shards_done == job.plan["shards"] == len(report["files"])
    assert f"merging took {max(report['summary']['seconds'], 1):.0f} s" in job.message
    said = "\n".join([*job.log, json.dumps(report)])
    assert str(jobs.settings.folder) not in said
    assert "resmerge-tests" not in said


def test_a_job_that_runs_says_so_and_keeps_to_its_memory(jobs, monkeypatch):
    """Until its process has ended nobody reads that it is done; what asking models takes is not
    shown as the merge's memory, which is no more than planned."""
    seen = []
    take = space.jobs.jobs.apply

    def noting(job, live, event):
        report = take(job, live, event)
        planned = job.plan.get("peak_memory_bytes", 0)
        seen.append((event["event"], job.state, job.message, job.memory_bytes <= planned))
        return report

    monkeypatch.setattr("space.jobs.jobs.apply", noting)
    job = jobs.submit(asked(jobs, BUILT_IN), owner="", key="k", token=None)

    assert ended(job) == "done", job.log
    assert job.message.startswith("Done in ")
    assert seen[-1][:2] == ("finished", "running")
    assert not [message for _, _, message, _ in seen if "Done" in message]
    assert all(within for *_, within in seen)


def assert_all_arrive(jobs, job, files):
    """Each address gives the bytes of its file, the archive all of them; a guessed one nothing."""
    browser = TestClient(Starlette(routes=[files.route()]))
    result = jobs.result(job)
    written = {path.relative_to(result).as_posix(): path.read_bytes()
               for path in result.rglob("*") if path.is_file()}  # fmt: skip

    got = {file.name: browser.get(file.path) for file in files.of(job)}

    assert {answer.status_code for answer in got.values()} == {200}
    archive = zipfile.ZipFile(io.BytesIO(got.pop("merged.zip").content))
    assert archive.testzip() is None
    assert {name: archive.read(name) for name in archive.namelist()} == written
    assert {name: answer.content for name, answer in got.items()} == written
    some = files.of(job)[1].path
    for guessed in (some.partition("?")[0], some[:-1] + "x", f"/files/{job.id}/%2e%2e/x?key=1"):
        assert browser.get(guessed).status_code == 404
    # Nothing was copied for it.
    assert not list(jobs.settings.folder.rglob("*.zip"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "code",
    ['print(\'{"event": "tens\', end="")', "print('no event at all')", "import os; os.close(0)"],
    ids=["cut line", "strange line", "deaf"],
)
def test_a_broken_process_does_not_stop_the_queue(jobs, monkeypatch, code):
    """What a merge's process leaves when it is ended by force ends its job, not the jobs behind."""
    begin = space.jobs.jobs.start_worker
    breaks = [True]

    def start(settings):
        if not breaks.pop():
            return begin(settings)
        breaks.append(False)
        return subprocess.Popen(
            [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    monkeypatch.setattr("space.jobs.jobs.start_worker", start)
    broken, whole = (
        jobs.submit(asked(jobs, BUILT_IN), owner="", key="k", token=None) for _ in range(2)
    )

    assert ended(broken) == "failed", broken.log
    assert ended(whole) == "done", whole.log


@pytest.mark.slow
def test_a_job_cancelled_as_it_starts_does_not_stop_the_queue(jobs, monkeypatch):
    """Cancelled between the start of its process and its request, a job makes way for the next."""
    begin = space.jobs.jobs.start_worker

    def start(settings):
        process = begin(settings)
        if not first.done:
            first.done.append(True)
            process.stdin.close()  # as `cancel` does
        return process

    first = SimpleNamespace(done=[])
    monkeypatch.setattr("space.jobs.jobs.start_worker", start)
    stopped, whole = (
        jobs.submit(asked(jobs, BUILT_IN), owner="", key="k", token=None) for _ in range(2)
    )

    assert ended(stopped) in ("failed", "resumable"), stopped.log
    assert ended(whole) == "done", whole.log


def test_a_merge_can_be_interrupted_whoever_started_the_server():
    """A worker takes interrupts also where those who started the server ignored them."""
    code = """
import signal
signal.signal(signal.SIGINT, signal.SIG_IGN)  # as a shell does for what runs in the background
from space.jobs.worker import main
main()  # nothing is asked
signal.raise_signal(signal.SIGINT)
"""
    assert "KeyboardInterrupt" in run_python(code, stdin=subprocess.DEVNULL).stderr


def test_the_end_of_a_process_that_is_gone_is_no_error():
    """Where the system has reaped a worker already, nothing is waited for and nothing raised."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()

    let_end(process)


@pytest.mark.slow
def test_the_built_in_merge_is_asked_questions(tmp_path):
    """After the built-in merge its models answer held-out prompts, the merge among them."""
    jobs = Jobs(Settings(folder=tmp_path / "space", prompts=1))
    job = jobs.submit(asked(jobs, BUILT_IN), owner="", key="", token=None)

    assert ended(job) == "done", job.log
    jobs.close()
    assert {"base", "merged"} <= set(job.accuracies)
    assert all(share[3] == 1 for row in job.accuracies.values() for share in row.values())


@pytest.mark.slow
def test_a_published_merge_is_the_same_as_from_the_command_line(jobs, on_hub):
    """Hub to Hub with a token leaves the bytes that the library leaves."""
    target = asked(jobs, HUB, push_to="alice/same")
    job = jobs.submit(target, owner="alice", key="", token=on_hub.token)

    assert ended(job) == "done", job.log
    files = on_hub.run(
        "merge", "--base", f"{on_hub.group}/base", "--expert", f"{on_hub.group}/expert0",
        "--expert", f"{on_hub.group}/expert1", "--out", str(jobs.settings.folder / "cli"), "--json",
    )  # fmt: skip
    assert files.code == 0
    for path in (jobs.settings.folder / "cli").glob("*.safetensors"):
        assert on_hub.hub.read("alice/same", path.name) == path.read_bytes()
    assert job.url.startswith(f"{on_hub.hub.endpoint}/alice/same")


@pytest.mark.slow
def test_cancel_stops_a_merge_that_hangs_and_it_goes_on_later(jobs, on_hub):
    """A merge stuck in a transfer is cancelled all the same; continued, it finishes."""
    stuck, go = threading.Event(), threading.Event()

    def wait():
        stuck.set()
        go.wait(PATIENCE_S)

    rule = on_hub.hub.faults.add(Hook(call=wait), path="/commit/resmerge-", skip=2)
    job = jobs.submit(asked(jobs, HUB, push_to="alice/hung"), owner="alice", key="",
                      token=on_hub.token)  # fmt: skip
    assert stuck.wait(PATIENCE_S)

    jobs.cancel(job)

    assert ended(job) == "cancelled"
    assert not any(run.token for run in jobs._runs.values())
    on_hub.hub.faults.remove(rule)
    go.set()
    found = {item.repo_id: item for item in _unfinished(on_hub)}
    assert found["alice/hung"].asked["push_to"] == "alice/hung"
    assert web_request(found["alice/hung"].asked, jobs.settings).to_dict() == job.asked
    jobs.resume(job, on_hub.token)
    assert ended(job) == "done", job.log
    assert job.bytes_kept > 0


def _unfinished(town):
    """Return what the library finds of unfinished merges, asked in a process with that Hub."""
    code = (
        "import json, dataclasses, sys\n"
        "from resmerge_stream.sinks.hub.leftovers import unfinished_merges\n"
        "found = unfinished_merges(sys.argv[1])\n"
        "print(json.dumps([dataclasses.asdict(item) for item in found]))"
    )

    done = run_python(code, town.token)
    assert done.returncode == 0, done.stderr
    return [Unfinished(**item) for item in json.loads(done.stdout)]


@pytest.mark.slow
def test_lost_permission_leaves_a_resumable_job(jobs, on_hub):
    """A token that is revoked in the middle stops the job, which says so and can go on."""
    token = on_hub.hub.add_token("alice", "write")
    revoked = threading.Event()

    def revoke():
        if not revoked.is_set():
            on_hub.hub.revoke_token(token)
            revoked.set()

    on_hub.hub.faults.add(Hook(call=revoke), path="/commit/resmerge-", skip=1, times=1)
    job = jobs.submit(asked(jobs, HUB, push_to="alice/lost"), owner="alice", key="", token=token)

    assert ended(job) == "resumable", job.log
    assert "token" in job.message
    jobs.resume(job, on_hub.token)
    assert ended(job) == "done", job.log


def test_a_refused_merge_fails_with_its_reason(jobs, on_hub):
    """What the plan refuses ends as failed, in the plan's words."""
    wrong = {"recipe": {"base_model": "alice/base", "models": ["alice/nothing"]}}
    job = jobs.submit(asked(jobs, wrong, push_to="alice/x"), owner="alice", key="",
                      token=on_hub.token)  # fmt: skip

    assert ended(job) == "failed"
    assert "alice/nothing" in job.message


def test_without_a_token_nobodys_models_are_read(jobs, on_hub, monkeypatch):
    """A merge without a token reads as nobody, even where the machine has a token."""
    monkeypatch.setenv("HF_TOKEN", on_hub.token)
    job = jobs.submit(asked(jobs, HUB), owner="", key="", token=None)

    assert ended(job) == "failed"
    assert "alice/expert0" in job.message


def test_one_merge_at_a_time_and_a_place_in_the_queue(jobs, on_hub):
    """The second job waits behind the first, is told so, and can be cancelled before it starts."""
    stuck, go = threading.Event(), threading.Event()

    def wait():
        stuck.set()
        go.wait(PATIENCE_S)

    on_hub.hub.faults.add(Hook(call=wait), path="alice/base", times=1)
    first = jobs.submit(asked(jobs, HUB, push_to="alice/q"), owner="alice", key="",
                        token=on_hub.token)  # fmt: skip
    assert stuck.wait(PATIENCE_S)
    second = jobs.submit(asked(jobs, BUILT_IN), owner="alice", key="", token=None)

    assert (second.state, jobs.place(second)) == ("queued", 1)
    with pytest.raises(RecipeError, match="2 jobs"):
        jobs.submit(asked(jobs, BUILT_IN), owner="alice", key="", token=None)
    jobs.cancel(second)
    assert second.state == "cancelled"
    jobs.cancel(first)
    go.set()
    assert ended(first) == "cancelled"


def test_jobs_survive_a_restart_as_records(tmp_path):
    """What was under way when the process ended is resumable; what was done stays done."""
    folder = tmp_path / "space"
    records = Records(folder / "jobs")
    running, done = new_job({"recipe": {}}, "me", ""), new_job({"recipe": {}}, "me", "")
    running.state, done.state = "running", "done"
    records.write(running)
    records.write(done)
    (folder / "jobs" / "damaged.json").write_text("{")

    jobs = Jobs(Settings(folder=folder))

    assert {job.id: job.state for job in jobs.of("me")} == {
        running.id: "resumable", done.id: "done",
    }  # fmt: skip
    assert jobs.of("") == []


def test_closing_leaves_running_jobs_resumable(tmp_path):
    """A Space that is stopped ends its merges, and finds them again."""
    settings = Settings(folder=tmp_path / "space", prompts=0)
    jobs = Jobs(settings)
    job = jobs.submit(asked(jobs, BUILT_IN), owner="me", key="", token="hf_secretsecret")
    until(lambda: job.state != "queued")

    jobs.close()

    again = Jobs(settings).get(job.id)
    assert again.state in ("resumable", "done")
    stored = "".join(p.read_text() for p in (tmp_path / "space").rglob("*") if p.suffix == ".json")
    assert job.id in stored
    assert "hf_secretsecret" not in stored


def test_old_files_and_records_go(tmp_path):
    """A day after a job ended its files are gone, after thirty its record."""
    settings = Settings(folder=tmp_path, keep_seconds=100)
    jobs = Jobs(settings)
    fresh, old, ancient = (new_job({"recipe": {}}, "me", "") for _ in range(3))
    for job, age in ((fresh, 0), (old, 200), (ancient, 100 * 40)):
        job.state = "done"
        jobs._jobs[job.id] = job
        jobs._records.write(job)
        job.updated = time.time() - age
        jobs.result(job).mkdir(parents=True)

    jobs._clean()

    assert [jobs.result(job).exists() for job in (fresh, old, ancient)] == [True, False, False]
    assert [jobs.get(job.id) is not None for job in (fresh, old, ancient)] == [True, True, False]


ALICE, BOB = Visitor("alice", "t-alice"), Visitor("bob", "t-bob")


@pytest.fixture
def service(jobs):
    """A service that knows two accounts by their tokens, without asking a Hub."""
    known = {"t-alice": ALICE, "t-bob": BOB}
    planners = Planners(jobs.settings)
    yield Service(jobs.settings, jobs, Visitors(known.__getitem__), Search(), planners)
    planners.close()


def test_a_job_is_its_owners(service):
    """An account's job is seen and changed by that account; others hear that there is none."""
    job = new_job({"recipe": {}}, "alice", "")
    service.jobs._jobs[job.id] = job

    assert service.job(job.id, ALICE, change=True) is job
    for visitor in (BOB, Visitor()):
        with pytest.raises(RecipeError, match=NO_JOB[:20]):
            service.job(job.id, visitor)


def test_a_job_without_account_is_changed_by_its_browser_only(service):
    """Its link shows it to anybody; to change it takes the secret of the browser."""
    job = new_job({"recipe": {}}, "", "key")
    service.jobs._jobs[job.id] = job

    assert service.job(job.id, BOB) is job
    assert service.job(job.id, Visitor(), key="key", change=True) is job
    for key in ("", "other"):
        with pytest.raises(RecipeError):
            service.job(job.id, Visitor(), key=key, change=True)


@pytest.mark.parametrize("job_id", ["", "../x", "a" * 42, "a" * 43, "%00" * 15])
def test_an_id_that_is_none_is_no_job(service, job_id):
    """Anything but a known id is answered alike."""
    with pytest.raises(RecipeError, match=NO_JOB[:20]):
        service.job(job_id, ALICE)


def test_merging_models_of_the_hub_needs_an_account(service):
    """Without an account only the built-in example is queued; with one, a target is needed."""
    with pytest.raises(PublishError, match="merged without an account"):
        service.submit(asked(service.jobs, HUB, push_to="alice/m"), Visitor())
    with pytest.raises(RecipeError, match="goes to the Hub"):
        service.submit(asked(service.jobs, HUB), ALICE)


def test_a_wrong_recipe_is_a_refused_plan(service):
    """The plan of something that is no recipe says why, and nothing was asked of anybody."""
    plan = service.plan({"recipe": {"base_model": "/etc", "models": ["o/e"]}}, Visitor())

    assert plan["refused"]
    assert "/etc" in plan["problems"][0]


def test_the_built_in_example_is_planned_by_name(service):
    """Its plan names the models as the web knows them, and fits here and elsewhere."""
    plan = service.plan(BUILT_IN, Visitor())

    assert not plan["refused"]
    assert [source["id"] for source in plan["sources"]] == [
        examples()[0].base, *examples()[0].experts,
    ]  # fmt: skip
    assert len(plan["hardware"]) > 5
