"""A merge as a Job: what is asked, sent and paid for, how it is followed, ended and continued.

The loopback Hub runs the Job's command as a process of this machine. In place of uv a stand-in
unpacks the uploaded wheel: the code that runs is the code that was sent, its dependencies are
those of this Python.
"""

import ctypes
import json
import os
import platform
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest
from huggingface_hub import HfApi

from loopback_hub import Answer, Hook
from loopback_hub.job_runner import JobRecord
from loopback_hub.services import machine
from resmerge_stream.errors import RecipeError
from resmerge_stream.hub import jobs as hub_jobs
from resmerge_stream.units import dollars, duration
from tests.support.hub_jobs import ends, jobs, no_jobs, payload, run_jobs
from tests.support.hub_runs import ROOT, Bench, Run

POST = "/api/jobs/alice$"


@pytest.fixture(autouse=True)
def _clean(bench: Bench) -> Iterator[None]:
    with no_jobs(bench):
        yield


def submit(bench: Bench, target: str, *arguments: str, yes: bool = True) -> Run:
    """Submit the merge of the group's repositories."""
    words = ["--yes"] if yes else []
    return bench.run("submit", *bench.sources(), "--push-to", target, *words, *arguments)


# From a command to a published repository


@pytest.mark.slow
def test_a_submitted_merge_is_published_with_the_same_bytes(bench: Bench) -> None:
    """The Job runs the code that was sent; its result is the merge's; the token stays a secret."""
    run_jobs(bench)

    done = submit(bench, "alice/merged")

    assert done.code == 0, done.err + done.out
    assert bench.published("alice/merged") == bench.expected()
    assert "Installed resmerge_stream" in done.out
    assert "merged into" in done.out
    assert "price:" in done.err
    assert bench.hub.repo("alice/merged").settings["private"]
    sent = payload(bench)
    assert sent.pop("secrets") == {"HF_TOKEN": bench.token}
    files = bench.hub.repo("alice/resmerge-stream-jobs", "datasets").at("main").files
    contents = [
        bench.hub._services.objects.path(entry.sha256).read_bytes() for entry in files.values()
    ]
    everything = json.dumps(sent) + done.out + done.err + repr(jobs(bench)[0].answer)
    assert bench.token not in everything
    assert not any(bench.token.encode() in content for content in contents)


def test_what_a_job_is_told(bench: Bench) -> None:
    """The request names machine, time, labels and the pinned, private, read-only files."""
    ends(bench)

    submit(bench, "alice/told", "--timeout", "45m", "--seed", "7", "--public", "--max-disk", "1GB")

    sent = payload(bench)
    repo = bench.hub.repo("alice/resmerge-stream-jobs", "datasets")
    (volume,) = sent["volumes"]
    assert repo.settings["private"]
    assert volume["revision"] in {commit.id for commit in repo.history("main")}
    assert (volume["mountPath"], volume["readOnly"]) == ("/resmerge", True)
    assert (sent["flavor"], sent["timeoutSeconds"]) == ("cpu-basic", 2700)
    assert set(sent["labels"]) == {"name", "resmerge-plan", "resmerge-target"}
    command = sent["command"]
    assert command[command.index("--torch-backend") + 1] == "cpu"
    merge = command[command.index("merge") + 2 :]
    expected = ["--push-to", "alice/told", "--public", "--max-disk", "1000000000", "--seed", "7"]
    assert merge == [*expected, "--patience", "1h"]


def test_a_gpu_gets_torch_with_cuda(bench: Bench) -> None:
    """On a machine with a GPU uv chooses torch's build by the driver."""
    ends(bench)

    submit(bench, "alice/gpu", "--device", "cuda")

    sent = payload(bench)
    assert sent["flavor"] == "t4-small"
    assert sent["command"][sent["command"].index("--torch-backend") + 1] == "auto"


def test_a_finished_target_needs_no_job(bench: Bench) -> None:
    """When the result is there, submitting again says so and spends nothing."""
    merged = bench.merge("--push-to", "alice/there")
    assert merged.code == 0, merged.err

    done = submit(bench, "alice/there")

    assert done.code == 0, done.err
    assert "already holds the finished result" in done.out
    assert not jobs(bench)


# Before money is spent


def test_nobody_to_ask_is_a_refusal(bench: Bench) -> None:
    """Without a terminal and without --yes nothing is started, uploaded or created."""
    done = submit(bench, "alice/unasked", yes=False)

    assert done.code == 2
    assert "--yes" in done.err
    assert not jobs(bench)
    assert not bench.hub.has_repo("alice/unasked")


def on_terminal(bench: Bench, target: str, answer: str) -> tuple[subprocess.Popen, int]:
    """Submit on a terminal and answer the question; return the process and its terminal."""
    terminal, end = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "resmerge_stream", "submit", *bench.sources(), "--push-to", target],
        env=bench.env(),
        cwd=bench.folder,
        stdin=end,
        stdout=end,
        stderr=end,
        start_new_session=True,
    )
    os.close(end)
    read_until(terminal, "[y/N]")
    os.write(terminal, answer.encode() + b"\n")
    return process, terminal


def read_until(terminal: int, words: str) -> str:
    """Read a terminal until it shows some words, or its process has ended."""
    shown = ""
    while words not in shown:
        try:
            shown += os.read(terminal, 4096).decode()
        except OSError:  # how Linux tells that nobody has the terminal open any more
            break
    return shown


def threads_of(process: subprocess.Popen[bytes]) -> list[int]:
    """The ids of a process's threads but for its main one."""
    ids = (int(name) for name in os.listdir(f"/proc/{process.pid}/task"))
    return sorted(number for number in ids if number != process.pid)


def signal_thread(process: subprocess.Popen[bytes], thread: int) -> None:
    """Send SIGINT to one thread of a process: it interrupts no wait of the main one."""
    tgkill = {"x86_64": 234, "aarch64": 131}[platform.machine()]
    assert ctypes.CDLL(None).syscall(tgkill, process.pid, thread, int(signal.SIGINT)) == 0


def test_no_is_an_answer(bench: Bench) -> None:
    """Anything but yes starts nothing."""
    process, terminal = on_terminal(bench, "alice/no", "")

    shown = read_until(terminal, "nothing was started")
    code = process.wait(300)  # before its terminal goes, to which it may still be writing
    os.close(terminal)

    assert code == 2, shown
    assert not jobs(bench)


@pytest.mark.parametrize("hears", ["main", "another"])
@pytest.mark.slow
def test_ctrl_c_leaves_the_job_running(bench: Bench, hears: str) -> None:
    """Who stops following is told how to follow again and how to cancel; pressing it once does.

    Whichever thread gets the signal: Python then looks at it when the main one's wait is over.
    """
    process, terminal = on_terminal(bench, "alice/left", "y")
    read_until(terminal, "Ctrl-C leaves it running")
    jobs(bench)[0].say("a line")
    read_until(terminal, "a line")

    if hears == "main":
        process.send_signal(signal.SIGINT)
    else:
        signal_thread(process, threads_of(process)[-1])
    shown = read_until(terminal, "hf jobs cancel")
    reference = f"alice/{jobs(bench)[0].answer['id']}"
    code = process.wait(300)
    os.close(terminal)
    assert code == 130
    assert f"resmerge-stream submit --attach {reference}" in shown
    assert jobs(bench)[0].answer["status"]["stage"] == "RUNNING"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--flavor", "cpu-huge"], "not one of the Hub's machines"),
        (["--flavor", "cpu-basic", "--device", "cuda"], "no device of the kind cuda"),
        (["--memory-budget", "900GB"], "no machine of the Hub fits"),
        (["--timeout", "soon"], "is not a time"),
        (["--expert", "alice/nobody"], "no such repository"),
    ],
    ids=["flavor", "device", "memory", "timeout", "expert"],
)
def test_what_cannot_work_is_refused_here(bench: Bench, arguments: list[str], words: str) -> None:
    """A wrong machine, time or source costs nothing: it is refused before a Job starts."""
    done = submit(bench, "alice/refused", *arguments)

    assert done.code == 2
    assert words in done.err
    assert not jobs(bench)


def test_folders_are_refused(bench: Bench) -> None:
    """A Job cannot see this machine's folders, so they are named and nothing is started."""
    done = bench.run("submit", *bench.folders(), "--push-to", "alice/folders", "--yes")

    assert done.code == 2
    assert "cannot see folders" in done.err


def test_the_hubs_prices_win_over_the_table(bench: Bench) -> None:
    """What the Hub lists now is what is chosen from; the table serves where it lists nothing."""
    bench.hub.settings.hardware = [machine("cpu-new", 4, 64, 100, 0.5)]
    ends(bench)

    live = submit(bench, "alice/live", "--json")
    bench.hub.faults.add(Answer(status=404), path="/jobs/hardware")
    table = submit(bench, "alice/table", yes=False)

    assert (live.events[0]["flavor"], live.events[0]["usd_at_most"]) == ("cpu-new", 15.0)
    assert "cpu-basic" in table.err


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (Answer(status=402, message="Pre-paid credit balance is insufficient"), "no credit"),
        (Answer(status=403, message="Missing permissions: job.write"), "may not run or see Jobs"),
        (Answer(status=400, message="Unknown option"), "does not take this Job"),
    ],
    ids=["402", "403", "400"],
)
def test_the_hubs_refusals_are_said_in_clear_words(
    bench: Bench, answer: Answer, words: str
) -> None:
    """No credit, no right, not such a Job: exit 2 with what to do and what the Hub said."""
    bench.hub.faults.add(answer, method="POST", path=POST)

    done = submit(bench, "alice/refused")

    assert done.code == 2
    assert words in done.err
    assert answer.message in done.err
    assert "Traceback" not in done.err


def test_a_token_without_the_scope_is_refused(bench: Bench) -> None:
    """A token that may publish and not run Jobs is told so before anything is uploaded."""
    token = bench.hub.add_token("alice", "contribute")

    done = bench.fresh(
        ["submit", *bench.sources(), "--push-to", "alice/scope", "--yes"], token=token
    )

    assert done.code == 2
    assert "start and manage Jobs" in done.err
    assert not bench.hub.log.find(method="POST", path="/repos/create")


def test_files_that_all_can_see_are_refused(bench: Bench) -> None:
    """A recipe may name private models, so it goes into no public repository."""
    name = "alice/resmerge-stream-jobs"
    if not bench.hub.has_repo(name, "datasets"):
        bench.hub.add_repo(name, private=True, kind="datasets")
    repo = bench.hub.repo(name, "datasets")
    repo.update_settings(private=False)

    done = submit(bench, "alice/public")

    repo.update_settings(private=True)
    assert done.code == 2
    assert "is public" in done.err
    assert not jobs(bench)


# Not twice


def test_a_lost_answer_does_not_start_a_second_job(bench: Bench) -> None:
    """When the connection breaks after the Hub took the Job, that Job is found and followed."""
    bench.hub.faults.add("reset", method="POST", path=POST, times=1, after=True)
    ends(bench)

    done = submit(bench, "alice/lost")

    assert done.code == 0, done.err
    assert len(jobs(bench)) == 1


def test_the_last_lines_are_read_when_the_stream_lost_them(bench: Bench) -> None:
    """Lines that came while the connection was away are asked for when the Job has ended."""
    client = hub_jobs.HubJobs(bench.token, "alice")
    client.api = HfApi(endpoint=bench.hub.endpoint, token=bench.token)
    job = JobRecord({"id": "rest", "owner": {"id": "u", "name": "alice", "type": "user"}})
    job.answer["status"] = {"stage": "COMPLETED", "message": None}
    bench.hub.recorded.jobs["rest"] = job
    for line in ("one", "two", "three"):
        # The client drops lines that are newer than the answer's Date, which has whole seconds.
        job.log.append({"timestamp": "2026-01-01T00:00:00.000Z", "data": line})

    assert list(client.rest("rest", 1)) == ["two", "three"]


def test_a_busy_hub_is_asked_again(bench: Bench) -> None:
    """A request that the Hub did not take is made again."""
    bench.hub.faults.add("503", method="POST", path=POST, times=1)
    ends(bench)

    done = submit(bench, "alice/busy")

    assert done.code == 0, done.err
    assert len(jobs(bench)) == 1


def test_the_same_submit_follows_the_job_that_runs(bench: Bench) -> None:
    """Submitting again finds the Job by its plan and target; another target is another Job."""
    ends(bench, "said to both", skip=1)
    first = bench.start(["submit", *bench.sources(), "--push-to", "alice/twice", "--yes"])
    while not jobs(bench):
        assert first.poll() is None
        time.sleep(0.02)

    second = submit(bench, "alice/twice", yes=False)

    out, err = first.communicate(timeout=300)
    assert (first.returncode, second.code) == (0, 0), err + second.err
    assert len(jobs(bench)) == 1
    assert "already runs" in second.err
    assert "said to both" in out
    assert "said to both" in second.out
    ends(bench)
    assert submit(bench, "alice/other").code == 0
    assert len(jobs(bench)) == 2


def test_a_job_can_be_followed_by_its_id(bench: Bench) -> None:
    """--attach needs no recipe, shows the log from its beginning, and ends as the Job did."""
    ends(bench, "resmerge-stream: wrong", "resmerge-stream job: exit code 2", stage="ERROR")
    submit(bench, "alice/attach")
    job_id = jobs(bench)[0].answer["id"]

    by_id = bench.run("submit", "--attach", job_id)
    with_name = bench.run("submit", "--attach", f"alice/{job_id}")
    unknown = bench.run("submit", "--attach", "0" * 24)

    assert by_id.out == with_name.out
    assert "resmerge-stream: wrong" in by_id.out
    assert (by_id.code, with_name.code, unknown.code) == (2, 2, 2)
    assert "no such Job" in unknown.err


# Jobs that do not end well


@pytest.mark.slow
def test_a_killed_job_continues_from_its_shards(bench: Bench) -> None:
    """Killed after its first shard, the Job ends with exit 3; the next one makes the rest."""
    run_jobs(bench)
    kill = Hook(call=lambda: jobs(bench)[0].end("ERROR", "Job timeout"))
    # The branch's first commit says whose run it is, the second holds a shard, the third the next.
    bench.hub.faults.add(kill, method="POST", path="/killed/commit/resmerge-", skip=2, times=1)

    first = submit(bench, "alice/killed")
    (branch,) = (ref for ref in bench.hub.repo("alice/killed").refs() if "resmerge-" in ref)
    staged = {
        name: entry.sha256
        for name, entry in bench.hub.repo("alice/killed").at(branch).files.items()
        if name.endswith(".safetensors")
    }
    second = submit(bench, "alice/killed")

    assert first.code == 3, first.err + first.out
    label = jobs(bench)[0].answer["labels"]["resmerge-plan"]
    assert branch == f"refs/heads/resmerge-{label}"  # the plan here is the plan there
    assert "Job timeout" in first.err
    assert "The same command" in first.err
    assert 1 <= len(staged) < 3  # a commit whose request had arrived is made all the same
    assert second.code == 0, second.err + second.out
    assert bench.published("alice/killed") == bench.expected()
    assert resumed(second) > resumed(first)


def resumed(run: Run) -> int:
    """Return the first number of percent that a Job's log tells: what was there already."""
    return int(next(line for line in run.out.splitlines() if " %" in line).split()[1])


def test_a_merge_that_is_refused_in_its_job_exits_2(bench: Bench) -> None:
    """What went wrong between the plan here and the one in the Job is refused, not resumable."""
    run_jobs(bench)
    taken = Hook(call=lambda: bench.hub.add_repo("alice/taken", {"README.md": "mine"}))
    bench.hub.faults.add(taken, method="POST", path=POST, times=1)

    done = submit(bench, "alice/taken")

    assert done.code == 2, done.out
    assert "nothing is overwritten" in done.out
    assert "its log above says why" in done.err


@pytest.mark.slow
def test_a_cancelled_job_ends_its_process(bench: Bench) -> None:
    """Cancelling ends what runs; who follows is told that the merge can go on later."""
    run_jobs(bench)

    def cancel() -> None:
        HfApi(endpoint=bench.hub.endpoint, token=bench.token).cancel_job(
            job_id=jobs(bench)[0].answer["id"], namespace="alice"
        )

    bench.hub.faults.add(Hook(call=cancel), method="POST", path="/gone/commit/resmerge-", times=1)

    done = submit(bench, "alice/gone")

    process = jobs(bench)[0].process
    assert process is not None
    assert process.wait(300) == -signal.SIGKILL
    assert done.code == 3
    assert "was cancelled" in done.err


def test_a_waiting_job_is_waited_for(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Job without a machine yet has no log: its stage is asked for until it has."""
    monkeypatch.setattr(hub_jobs, "_POLL_SECONDS", 0.01)
    client = hub_jobs.HubJobs(bench.token, "alice")
    client.api = HfApi(endpoint=bench.hub.endpoint, token=bench.token)
    job = JobRecord({"id": "waits", "owner": {"id": "u", "name": "alice", "type": "user"}})
    job.answer["status"] = {"stage": "SCHEDULING", "message": None}
    bench.hub.recorded.jobs["waits"] = job
    runs = Hook(call=lambda: job.answer.update(status={"stage": "RUNNING", "message": None}))
    bench.hub.faults.add(runs, path="/jobs/alice/waits", skip=1, times=1)
    ends(bench, "hello")

    lines = list(client.log("waits"))

    assert lines == ["hello"]
    assert client.ending("waits").status.stage == "COMPLETED"


def test_a_broken_line_does_not_end_the_job(bench: Bench) -> None:
    """Who cannot follow any more is told that the Job goes on; the exit code says: again."""
    bench.hub.faults.add(Answer(status=500, message="down"), path="/logs")

    done = submit(bench, "alice/line")

    assert done.code == 3
    assert "the Job goes on" in done.err
    assert jobs(bench)[0].answer["status"]["stage"] == "RUNNING"


# The line to copy


@pytest.mark.parametrize(
    ("text", "seconds"), [("90m", 5400), ("1.5h", 5400), ("5400", 5400), ("2d", 172_800)]
)
def test_a_time_is_a_number_and_a_unit(text: str, seconds: int) -> None:
    """Times are written as the Hub's own client takes them."""
    assert duration(text) == seconds


@pytest.mark.parametrize("text", ["", "5", "h", "-1h", "1e9h", "nan", "40d", "2 hours"])
def test_what_is_no_time_is_refused(text: str) -> None:
    """A time that would end the Job at once, or never, is refused."""
    with pytest.raises(RecipeError, match="is not a time"):
        duration(text)


def test_prices_are_never_rounded_to_nothing() -> None:
    """What costs something is at least a cent."""
    assert [dollars(x) for x in (0.0, 0.0001, 0.5, 123.4)] == ["$0.00", "$0.01", "$0.50", "$123"]


def test_help_needs_neither_torch_nor_the_hubs_client() -> None:
    """The options of submit are shown without importing what a merge needs."""
    code = (
        "import sys\nfrom resmerge_stream.cli.main import main\n"
        "try: main(['submit', '--help'])\nexcept SystemExit: pass\n"
        "print(*({'torch', 'huggingface_hub'} & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )

    assert done.stderr.strip() == ""
    assert "--attach JOB_ID" in done.stdout
