"""A merge as several Jobs: asked and paid for together, started all or none, followed as one.

The loopback Hub runs each Job as a process of this machine, and gives their network group an
address and a port of its own.
"""

import json
import os
import signal
import subprocess
import threading
from collections.abc import Iterator

import pytest

from loopback_hub import Answer, Hook
from loopback_hub.job_runner import kill
from tests.support.hub_jobs import jobs, no_jobs, run_jobs
from tests.support.hub_runs import Bench, Run

POST = "/api/jobs/alice$"


@pytest.fixture(autouse=True)
def _clean(bench: Bench) -> Iterator[None]:
    with no_jobs(bench):
        yield


def words(bench: Bench, target: str, *arguments: str) -> list[str]:
    """Return the command that submits the merge of the group's repositories."""
    return ["submit", *bench.sources(), "--push-to", target, *arguments]


def submit(bench: Bench, target: str, *arguments: str) -> Run:
    """Submit it, and agree to the price."""
    return bench.run(*words(bench, target, "--yes", *arguments))


def stages(bench: Bench) -> list[str]:
    """Return the stage of each Job, in the order in which they were started."""
    return [job.answer["status"]["stage"] for job in jobs(bench)]


def first_ends(bench: Bench, *lines: str, stage: str = "COMPLETED") -> None:
    """Let the first Job say these lines and end, when its log is asked for; all, if it is done."""

    def call() -> None:
        for line in lines:
            jobs(bench)[0].say(line)
        for job in jobs(bench)[1:] if stage == "COMPLETED" else []:
            job.end(stage)
        jobs(bench)[0].end(stage)

    bench.hub.faults.add(Hook(call=call), path="/logs", times=1)


def followed(bench: Bench, command: list[str]) -> subprocess.Popen[str]:
    """Start a command, and return when it follows the Jobs that it started."""
    asked = threading.Event()
    bench.hub.faults.add(Hook(call=asked.set), path="/logs", times=1)
    process = bench.start(command)
    while not asked.wait(0.05):
        assert process.poll() is None, process.communicate()
    return process


@pytest.mark.slow
def test_three_jobs_publish_the_bytes_of_one_process(bench: Bench) -> None:
    """Three machines find each other, share the shards, and one commit shows the result."""
    run_jobs(bench)

    done = submit(bench, "alice/three", "--machines", "3", "--json")

    log = [event["line"] for event in done.events if event["event"] == "log"]
    assert done.code == 0, (done.err, log)
    assert bench.published("alice/three") == bench.expected()
    assert bench.history("alice/three") == ["Merge with ResMerge Stream", "initial commit"]
    assert stages(bench) == ["COMPLETED"] * 3
    assert [job.attempt for job in jobs(bench)] == [1, 1, 1]
    assert any("merged into" in line for line in log)
    report = json.loads(bench.hub.read("alice/three", "resmerge/report.json"))
    assert report["environment"]["processes"] == 3
    # What it took is known to the next estimate; an estimate starts nothing.
    again = bench.run(*words(bench, "alice/four"))
    assert again.code == 2
    assert "measured today on 1 run" in again.err


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1, 2])
def test_a_machine_that_is_lost_is_started_again_and_all_continue(
    bench: Bench, victim: int
) -> None:
    """Whichever of three is killed: its next attempt joins the others; the bytes are the same."""
    run_jobs(bench)
    target = f"alice/lost{victim}"
    bench.forget_uploads()

    def lose() -> None:
        process = jobs(bench)[victim].process
        assert process is not None
        kill(process)

    # The branch's first commit says whose run it is; the next ones hold shards.
    rule = bench.hub.faults.add(
        Hook(call=lose),
        method="POST",
        path=f"{target}/commit/resmerge",
        skip=1,
        times=1,
        after=True,
    )

    done = submit(bench, target, "--machines", "3", "--attempts", "6")

    assert rule.hits == 1
    assert done.code == 0, done.err + done.out
    assert jobs(bench)[victim].attempt >= 2
    assert bench.published(target) == bench.expected()


def test_what_each_of_several_jobs_is_told(bench: Bench) -> None:
    """One group, an alias each, the same machine and files; numbers tell them apart."""
    first_ends(bench, "merging: 1 GB to write", "resmerge-stream job: exit code 0")

    done = submit(bench, "alice/told3", "--machines", "3")

    assert done.code == 0, done.err
    sent = [body for path, body in bench.hub.recorded.payloads if path.endswith("/jobs/alice")]
    assert len(sent) == 3
    assert len({body["network"]["group"] for body in sent}) == 1
    assert [body["network"]["aliases"] for body in sent] == [
        ["machine0"],
        ["machine1"],
        ["machine2"],
    ]
    assert [body["labels"]["resmerge-machine"] for body in sent] == ["0-of-3", "1-of-3", "2-of-3"]
    assert [body["attempts"] for body in sent] == [3, 3, 3]
    for key in ("flavor", "volumes", "timeoutSeconds", "environment"):
        assert sent[0][key] == sent[1][key] == sent[2][key]
    scripts = [body["command"][2] for body in sent]
    for number, script in enumerate(scripts):
        assert script.startswith(f"RANK={number} WORLD_SIZE=3 ")
        assert 'MASTER_ADDR="${HF_NETWORK_GROUP_PREFIX}machine0"' in script
    assert len({tuple(body["command"][3:]) for body in sent}) == 1


@pytest.mark.parametrize("arguments", [[], ["--machines", "1"]], ids=["nothing", "one"])
def test_one_machine_is_asked_for_as_before(bench: Bench, arguments: list[str]) -> None:
    """A single Job is in no network, has one attempt, and its command begins with the tool."""
    first_ends(bench)

    done = submit(bench, f"alice/alone{len(arguments)}", *arguments)

    assert done.code == 0, done.err
    ((_, sent),) = [it for it in bench.hub.recorded.payloads if it[0].endswith("/jobs/alice")]
    assert not {"network", "attempts"} & set(sent)
    assert sent["command"][2].startswith('"$@"; ')
    assert set(sent["labels"]) == {"name", "resmerge-plan", "resmerge-target"}


def test_attempts_are_asked_of_the_hub(bench: Bench) -> None:
    """--attempts reaches the Hub, and the highest price counts each of them."""
    first_ends(bench)

    done = submit(bench, "alice/tries", "--attempts", "4", "--timeout", "2h", "--json")

    offered = done.events[0]
    ((_, sent),) = [it for it in bench.hub.recorded.payloads if it[0].endswith("/jobs/alice")]
    assert sent["attempts"] == 4
    assert offered["usd_at_most"] == pytest.approx(4 * 2 * 0.01, rel=0.01)


def test_the_price_is_that_of_all(bench: Bench) -> None:
    """It is asked before anything is started, and its most is every attempt of every Job."""
    first_ends(bench)

    asked = bench.run(*words(bench, "alice/price", "--machines", "3"))
    assert not jobs(bench)
    done = submit(bench, "alice/price", "--machines", "3", "--timeout", "1h", "--json")

    offered = done.events[0]
    assert asked.code == 2
    assert "for all" in asked.err
    assert "3 × cpu-basic" in asked.err
    assert (offered["machines"], offered["attempts"]) == (3, 3)
    assert offered["usd_at_most"] == pytest.approx(3 * 3 * 0.01, rel=0.01)
    minutes = -(-offered["seconds_estimate"] // 60)
    assert offered["usd_estimate"] == pytest.approx(3 * minutes / 60 * 0.01, abs=1e-3)


def test_auto_shows_a_table_and_takes_of_it_what_is_worth_it(bench: Bench) -> None:
    """1, 2, 4, …: time, price and what they wait for; a merge of seconds gains from one alone."""
    done = bench.run(*words(bench, "alice/auto", "--machines", "auto", "--json"))

    offered = done.events[0]
    assert [choice["machines"] for choice in offered["choices"]][:2] == [1, 2]
    assert {choice["limit"] for choice in offered["choices"]} == {"start"}
    assert offered["machines"] == 1
    assert "waits for" in done.err
    assert not jobs(bench)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--machines", "0"], "--machines '0' is not a number from 1 to 64 or auto"),
        (["--machines", "many"], "--machines 'many' is not a number"),
        (["--machines", "65"], "from 1 to 64"),
        (["--machines", "64"], "each is made by one machine"),
        (["--machines", "2", "--flavor", "cpu-huge"], "not one of the Hub's machines"),
        (["--machines", "2", "--then", "evaluate", "--tasks", "add"], "asks one machine"),
        (["--attempts", "0"], "--attempts '0' is not a number from 1 to 10"),
    ],
    ids=["none", "word", "most", "shards", "flavor", "then", "attempts"],
)
def test_what_several_machines_cannot_do_is_refused_here(
    bench: Bench, arguments: list[str], told: str
) -> None:
    """A wrong number, or more machines than there are files, costs nothing."""
    done = submit(bench, "alice/wrong", *arguments)

    assert done.code == 2
    assert told in done.err
    assert not jobs(bench)


@pytest.mark.parametrize("which", [1, 2], ids=["second", "third"])
def test_a_start_that_is_refused_leaves_nothing_running(bench: Bench, which: int) -> None:
    """Where one of three is not started, those before it are cancelled, and that is said."""
    refusal = Answer(status=402, message="Pre-paid credit balance is insufficient")
    bench.hub.faults.add(refusal, method="POST", path=POST, skip=which)

    done = submit(bench, "alice/half", "--machines", "3")

    assert done.code == 2
    assert f"machine {which + 1} of 3 could not be started" in done.err
    assert "no credit" in done.err
    assert "are cancelled" in done.err
    assert stages(bench) == ["CANCELED"] * which


def test_what_cannot_be_cancelled_is_named(bench: Bench) -> None:
    """Where the Hub does not take the cancel either, the command to do so is printed."""
    refusal = Answer(status=402, message="Pre-paid credit balance is insufficient")
    bench.hub.faults.add(refusal, method="POST", path=POST, skip=1)
    bench.hub.faults.add(Answer(status=403, message="no"), method="POST", path="/cancel$")

    done = submit(bench, "alice/stuck", "--machines", "2")

    assert done.code == 2
    assert f"hf jobs cancel alice/{jobs(bench)[0].answer['id']}" in done.err


def test_ctrl_c_leaves_all_running_and_the_same_command_finds_them(bench: Bench) -> None:
    """Who stops following ends nothing; the same command follows the first of the three again."""
    command = words(bench, "alice/left3", "--machines", "3", "--yes")
    following = followed(bench, command)

    following.send_signal(signal.SIGINT)
    _, err = following.communicate(timeout=300)

    assert following.returncode == 130
    assert stages(bench) == ["RUNNING"] * 3
    first = jobs(bench)[0].answer["id"]
    assert f"submit --attach alice/{first}" in err
    first_ends(bench, "said by the first", "resmerge-stream job: exit code 0")
    again = bench.run(*command)
    assert again.code == 0, again.err
    assert "already runs" in again.err
    assert "said by the first" in again.out
    assert len(jobs(bench)) == 3


def test_the_others_end_with_the_first(bench: Bench) -> None:
    """A first machine that is gone for good leaves none that waits for it and costs money."""
    first_ends(bench, "resmerge-stream: later.", "resmerge-stream job: exit code 3", stage="ERROR")

    done = submit(bench, "alice/gone3", "--machines", "3")

    assert done.code == 3
    assert stages(bench) == ["ERROR", "CANCELED", "CANCELED"]
    assert "cancelled, as the first machine of their run has ended" in done.err


def test_what_a_lost_first_machine_left_is_cancelled_before_a_new_start(bench: Bench) -> None:
    """The same command does not follow machines whose first is gone: it ends them, and begins."""
    command = words(bench, "alice/rest3", "--machines", "2", "--yes")
    following = followed(bench, command)
    os.kill(following.pid, signal.SIGKILL)
    following.communicate()
    jobs(bench)[0].end("ERROR")

    def call() -> None:
        for job in jobs(bench)[2:]:
            job.end("COMPLETED")

    bench.hub.faults.add(Hook(call=call), path="/logs", times=1)
    again = bench.run(*command)

    assert again.code == 0, again.err
    assert stages(bench) == ["ERROR", "CANCELED", "COMPLETED", "COMPLETED"]
    assert "already runs" not in again.err
