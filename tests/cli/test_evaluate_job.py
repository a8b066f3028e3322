"""An evaluation as a Job: alone, and after the merge that it asks.

The loopback Hub runs the Job's command as a process of this machine, as in test_submit.py.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from loopback_hub import Answer, LoopbackHub
from loopback_hub.services import machine
from resmerge_stream.experts.group import builtin_group
from tests.support.hub_jobs import ends, jobs, no_jobs, payload, run_jobs
from tests.support.hub_runs import Bench, Run

GROUP = builtin_group()
NAMES = {"base": "alice/base", "rl-sort": "alice/sort", "rl-add": "alice/add"}
MODELS = tuple(NAMES.values())
RECIPE = ("--base", MODELS[0], "--expert", MODELS[1], "--expert", MODELS[2])
L4 = machine("l4x1", 8, 30, 400, 0.0133, "L4 24 GB")


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    """A Hub with the built-in group and a merge of it, and a machine with a GPU to rent."""
    folder = tmp_path_factory.mktemp("hub")
    with LoopbackHub(folder / "hub") as hub:
        bench = Bench(hub, folder, hub.add_user("alice"))
        hub.settings.hardware = [*hub.settings.hardware, L4]
        for name, repo_id in NAMES.items():
            hub.add_repo(repo_id, GROUP[name], private=True)
        done = bench.run("merge", *RECIPE, "--push-to", "alice/merged")
        assert done.code == 0, done.err
        yield bench
        bench.close()


@pytest.fixture(autouse=True)
def _clean(bench: Bench) -> Iterator[None]:
    with no_jobs(bench):
        yield


def evaluate(bench: Bench, *arguments: str, tasks: str = "sort,add", yes: bool = True) -> Run:
    """Evaluate base and merge, and models that come first in the arguments, in a Job."""
    words = [*arguments, "--job", *(["--yes"] if yes else [])]
    words += [] if "--tasks" in words else ["--tasks", tasks]
    return bench.run("evaluate", MODELS[0], "alice/merged", *words)


def then(bench: Bench, target: str, *arguments: str, yes: bool = True) -> Run:
    """Merge in a Job and evaluate what was merged."""
    words = ["--then", "evaluate", "--tasks", "sort,add", *(["--yes"] if yes else [])]
    return bench.run("submit", *RECIPE, "--push-to", target, *words, *arguments)


def proposed(bench: Bench, repo_id: str) -> dict:
    """Return the evaluation in the report of a repository's one pull request."""
    files = bench.hub.repo(repo_id).at("refs/pr/1").files
    path = bench.hub._services.objects.path(files["resmerge/report.json"].sha256)
    return json.loads(path.read_text())["evaluation"]


# From a command to a pull request


@pytest.mark.slow
def test_an_evaluation_runs_as_a_job_and_becomes_a_pull_request(bench: Bench) -> None:
    """The Job asks the models what is asked here, with the same answers; main stays as it is."""
    run_jobs(bench)
    before = bench.hub.files("alice/merged")

    done = evaluate(bench, "--card", "alice/merged", "--limit", "40")

    assert done.code == 0, done.err + done.out
    assert "price:" in done.err
    assert "proposed for the card: " in done.out
    assert bench.hub.files("alice/merged") == before
    here = bench.run(
        *("evaluate", MODELS[0], "alice/merged", "--tasks", "sort,add", "--limit", "40"),
        *("--out", str(bench.folder / "here"), "--device", "cpu", "--json"),
    )
    assert here.code == 0, here.err
    assert proposed(bench, "alice/merged")["models"] == here.last["models"]
    assert bench.token not in json.dumps(payload(bench)["command"]) + done.out + done.err


@pytest.mark.slow
def test_a_merge_is_evaluated_in_the_job_that_made_it(bench: Bench, tmp_path: Path) -> None:
    """One Job publishes and proposes; given again it merges nothing and finds its pull request."""
    run_jobs(bench)
    questions = tmp_path / "it's asked.jsonl"  # a name that a shell would take apart
    questions.write_text('{"prompt": "sort:cab>", "answer": "abc", "max_new_tokens": 8}\n')
    asked = ("--tasks", f"{questions},sort", "--limit", "20")

    done = then(bench, "alice/both", *asked)
    again = then(bench, "alice/both", *asked)

    assert (done.code, again.code) == (0, 0), done.err + done.out + again.err + again.out
    assert len(jobs(bench)) == 2
    assert "merged into" in done.out
    found = proposed(bench, "alice/both")["models"]
    assert list(found) == [*MODELS, "alice/both"]
    assert set(found["alice/both"]) == {"it's asked", "sort", "mean"}
    assert set(bench.hub.repo("alice/both").refs()) >= {"refs/heads/main", "refs/pr/1"}
    assert "refs/pr/2" not in bench.hub.repo("alice/both").refs()


@pytest.mark.slow
def test_an_evaluation_that_fails_leaves_the_merge_and_says_why(bench: Bench) -> None:
    """A check that fails in the Job is exit 2 with its words; what was merged is published."""
    run_jobs(bench)
    broken = {"prompt": "sort:cab>", "verify": "python", "function": "def check(t):\n    1 / 0"}
    (bench.folder / "broken.jsonl").write_text(json.dumps(broken))

    done = then(bench, "alice/half", "--tasks", str(bench.folder / "broken.jsonl"))

    assert done.code == 2, done.err + done.out
    assert "check failed" in done.out
    assert "its log above says why" in done.err
    assert "model.safetensors" in bench.hub.files("alice/half")
    assert "refs/pr/1" not in bench.hub.repo("alice/half").refs()


# What a Job is told


def test_the_job_is_the_same_command_on_a_gpu(bench: Bench, tmp_path: Path) -> None:
    """Models, tasks and card are the user's; a file of questions goes along; the GPU fits."""
    questions = tmp_path / "mine.jsonl"
    questions.write_text('{"prompt": "a", "answer": "b"}\n')
    ends(bench)

    done = evaluate(bench, "--card", "alice/merged", "--json", tasks=f"{questions},sort")

    sent = payload(bench)
    command = sent["command"]
    files = bench.hub.repo("alice/resmerge-stream-jobs", "datasets").at("main").files
    (path,) = (path for path in files if path.endswith("/mine.jsonl"))
    assert sent["flavor"] == "l4x1"
    assert command[command.index("evaluate") :] == [
        *("evaluate", MODELS[0], "alice/merged", "--tasks", f"/resmerge/{path},sort"),
        *("--limit", "500", "--card", "alice/merged"),
    ]
    assert "--with" not in command
    offer = done.events[0]
    assert (offer["event"], offer["flavor"]) == ("offered", "l4x1")
    assert offer["models"] == [MODELS[0], "alice/merged"]
    assert 0 < offer["usd_estimate"] <= offer["usd_at_most"]


@pytest.mark.slow
def test_the_harness_is_installed_where_its_tasks_are_asked(bench: Bench, tmp_path: Path) -> None:
    """The Job gets lm-evaluation-harness for a task of its own, and not for others."""
    (tmp_path / "mine.yaml").write_text("task: mine\ndataset_path: alice/data\n")
    ends(bench)

    done = evaluate(bench, "--card", "alice/merged", tasks=str(tmp_path / "mine.yaml"))

    assert done.code == 0, done.err
    command = payload(bench)["command"]
    assert command[command.index("--with") + 1].startswith("lm_eval")


def test_a_merge_and_its_evaluation_are_one_job(bench: Bench) -> None:
    """The evaluation runs when the merge did not fail; its time is in the price."""
    ends(bench)
    done = then(bench, "alice/one", "--json")
    sent = payload(bench)
    bench.hub.recorded.payloads.clear()
    ends(bench)
    alone = bench.run("submit", *RECIPE, "--push-to", "alice/two", "--yes", "--json")

    script = sent["command"][2]
    assert script.startswith('"$@" && uv tool run ')
    assert f"evaluate {' '.join(MODELS)} alice/one --tasks sort,add" in script
    assert "merge" in sent["command"]
    assert {"resmerge-plan", "resmerge-target", "resmerge-evaluation"} < set(sent["labels"])
    assert (sent["flavor"], payload(bench)["flavor"]) == ("l4x1", "cpu-basic")
    assert done.events[0]["seconds_estimate"] > alone.events[0]["seconds_estimate"]


# Before money is spent


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "Name that model with --card"),
        (["--card", "alice/sort"], "not among the models"),
        (["--card", MODELS[0]], "of a merge"),
        (["--card", "alice/merged", "--flavor", "cpu-basic"], "it has no GPU"),
        (["--card", "alice/merged", "--flavor", "t4-small"], "bf16"),
        (["--card", "alice/merged", "--flavor", "huge"], "not one of the Hub's machines"),
        (["--card", "alice/merged", "--timeout", "soon"], "is not a time"),
        (["--card", "alice/merged", "--limit", "0"], "at least one question"),
        (["--card", "alice/merged", "--tasks", "none.jsonl"], "there is no file"),
        (["alice/nobody", "--card", "alice/merged"], "no such repository"),
        ([str(GROUP["base"]), "--card", "alice/merged"], "cannot see folders"),
    ],
    ids=["no-card", "other", "no-merge", "cpu", "t4", "flavor", "time", "limit", "file", "model",
         "folder"],
)  # fmt: skip
def test_what_cannot_be_evaluated_is_refused_here(
    bench: Bench, arguments: list[str], words: str
) -> None:
    """A wrong card, machine, time, task or model costs nothing: it is refused before a Job."""
    done = evaluate(bench, *arguments)

    assert done.code == 2
    assert words in done.err
    assert done.err.count("resmerge-stream: ") == 1
    assert not jobs(bench)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--create-pr"], "leave out --create-pr"),
        (["--as", "adapter"], "leave out --as"),
        (["--tasks", ""], "need each other"),
        (["--flavor", "cpu-basic"], "it has no GPU"),
    ],
    ids=["pull-request", "adapter", "tasks", "cpu"],
)
def test_a_merge_that_cannot_be_asked_is_refused_here(
    bench: Bench, arguments: list[str], words: str
) -> None:
    """A merge that is no model at main, or a machine without a GPU, is refused before a Job."""
    done = then(bench, "alice/refused", *arguments)

    assert done.code == 2
    assert words in done.err
    assert not jobs(bench)


def test_a_model_that_no_machine_holds_is_refused(bench: Bench) -> None:
    """Where no GPU is large enough, it is said how much the model takes and what there is."""
    bench.hub.settings.hardware = [machine("tiny", 8, 30, 400, 0.01, "T 0.001 GB")]

    done = evaluate(bench, "--card", "alice/merged")

    assert done.code == 2
    assert "no machine of the Hub fits this evaluation: on tiny, the largest model" in done.err


def test_a_yaml_task_that_needs_more_files_is_refused(bench: Bench, tmp_path: Path) -> None:
    """A Job gets the file itself, so what it refers to on this machine would be missing there."""
    (tmp_path / "mine.yaml").write_text("task: mine\ndataset_kwargs:\n  data_files: a.jsonl\n")

    done = evaluate(bench, "--card", "alice/merged", tasks=str(tmp_path / "mine.yaml"))

    assert done.code == 2
    assert "refers to other files" in done.err
    assert not jobs(bench)


def test_nobody_to_ask_starts_no_evaluation(bench: Bench) -> None:
    """Without a terminal and without --yes the price is shown and nothing is started."""
    done = evaluate(bench, "--card", "alice/merged", yes=False)

    assert done.code == 2
    assert "price:" in done.err
    assert "--yes" in done.err
    assert not jobs(bench)


def test_how_a_job_runs_is_said_of_a_job_only(bench: Bench) -> None:
    """--yes without --job would look like a Job and be none."""
    done = bench.run("evaluate", MODELS[0], "--tasks", "sort", "--yes")

    assert done.code == 2
    assert "give --job as well" in done.err


# Not twice


def test_the_same_evaluation_follows_the_job_that_runs(bench: Bench) -> None:
    """Given again it is followed; other tasks are another Job."""
    held = evaluate_and_leave(bench)
    ends(bench, "said to both")

    again = evaluate(bench, "--card", "alice/merged", yes=False)

    assert again.code == 0, again.err
    assert "already runs" in again.err
    assert "said to both" in again.out
    assert [job.answer["id"] for job in jobs(bench)] == [held]
    ends(bench)
    assert evaluate(bench, "--card", "alice/merged", tasks="sort").code == 0
    assert len(jobs(bench)) == 2


def test_a_merge_that_runs_without_its_evaluation_is_not_merged_twice(bench: Bench) -> None:
    """Two Jobs would write to the same branch: the second is refused, and says what to do."""
    bench.hub.faults.add(Answer(status=500, message="down"), path="/logs")
    bench.run("submit", *RECIPE, "--push-to", "alice/running", "--yes")

    done = then(bench, "alice/running")

    assert done.code == 2
    assert "without this evaluation" in done.err
    assert len(jobs(bench)) == 1


def test_a_merge_is_followed_where_its_job_evaluates_too(bench: Bench) -> None:
    """Who asks for the merge alone gets it from the Job that goes on to evaluate it."""
    bench.hub.faults.add(Answer(status=500, message="down"), path="/logs")
    left = then(bench, "alice/more")
    bench.hub.faults.clear()
    ends(bench, "said by that Job")

    done = bench.run("submit", *RECIPE, "--push-to", "alice/more", "--yes")

    assert (left.code, done.code) == (3, 0), left.err + done.err
    assert "said by that Job" in done.out
    assert len(jobs(bench)) == 1


def evaluate_and_leave(bench: Bench) -> str:
    """Start an evaluation whose log cannot be read, and return its Job's id; it goes on."""
    bench.hub.faults.add(Answer(status=500, message="down"), path="/logs")
    left = evaluate(bench, "--card", "alice/merged")
    assert left.code == 3, left.err
    bench.hub.faults.clear()
    return jobs(bench)[0].answer["id"]
