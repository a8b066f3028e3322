"""A published merge asked as a Job that the visitor pays for: the price first, then the start."""

import json
from collections.abc import Iterator

import pytest
from gradio_client.exceptions import AppError

from loopback_hub.services import machine
from resmerge_stream.errors import PublishError, RecipeError
from resmerge_stream.experts.group import builtin_group
from resmerge_stream.experts.tasks import answer, draw_prompts
from space.asking import ask_as_job, models_asked
from space.identity import Visitor
from tests.support.hub_jobs import JOB_ENVIRONMENT
from tests.support.space_runs import Town, client_of, ended, wait_for

GROUP = builtin_group()
NAMES = {"base": "alice/asked-base", "rl-sort": "alice/asked-sort", "rl-add": "alice/asked-add"}
RECIPE = {"base_model": NAMES["base"], "models": [NAMES["rl-sort"], NAMES["rl-add"]]}
REPORT = {
    "recipe": RECIPE,
    "sources": [{"files": [{"name": "model.safetensors"}]}],
    "tensors": [{"name": "w", "dtype": "BF16", "shape": [4, 4]}],
}


@pytest.fixture(scope="module")
def asked(town: Town) -> Iterator[str]:
    """A published merge of the built-in group, and a machine with a GPU to rent."""
    before = town.hub.settings.hardware
    town.hub.settings.hardware = [*before, machine("l4x1", 8, 30, 400, 0.0133, "L4 24 GB")]
    for name, repo_id in NAMES.items():
        town.hub.add_repo(repo_id, GROUP[name])
    with client_of(town, town.alice) as client:
        job = client.predict(recipe=RECIPE, push_to="alice/asked", api_name="/merge")["job"]
        assert ended(client, job)["state"] == "done"
    yield job
    town.hub.settings.hardware = before


def jobs_started(town: Town) -> int:
    """Return how many Jobs the Hub was asked to start."""
    return len(town.hub.recorded.jobs)


@pytest.mark.slow
def test_a_job_is_offered_before_it_is_started_and_runs_to_a_pull_request(
    town: Town, asked: str
) -> None:
    """Nothing starts below its highest price; then one Job, however often, and its results."""
    town.hub.settings.run_jobs = JOB_ENVIRONMENT
    how = {"tasks": "sort", "limit": 20, "api_name": "/evaluate"}
    try:
        with client_of(town, town.alice) as client:
            offered = client.predict(job_or_repo=asked, **how)
            too_little = client.predict(
                job_or_repo=asked, pay_up_to=offered["usd_at_most"] / 2, **how
            )
            before = jobs_started(town)
            pay = {"pay_up_to": offered["usd_at_most"]}
            started = client.predict(job_or_repo=asked, **pay, **how)
            again = client.predict(job_or_repo="alice/asked", **pay, **how)
        repo = town.hub.repo("alice/asked")
        wait_for(lambda: "refs/pr/1" in repo.refs(), "the results", patience_s=180.0)
    finally:
        town.hub.settings.run_jobs = None

    assert offered["flavor"] == "l4x1"
    assert 0 < offered["usd_estimate"] < offered["usd_at_most"]
    assert (offered["url"], too_little["url"], before) == ("", "", 0)
    assert started["url"].startswith(f"{town.hub.endpoint}/jobs/alice/")
    assert again["url"] == started["url"]
    assert jobs_started(town) == 1
    files = repo.at("refs/pr/1").files
    path = town.hub._services.objects.path(files["resmerge/report.json"].sha256)
    assert list(json.loads(path.read_text())["evaluation"]["models"]) == [
        *NAMES.values(),
        "alice/asked",
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"tasks": "/etc/passwd.jsonl"}, "names no task"),
        ({"tasks": "../questions.yaml"}, "names no task"),
        ({"tasks": ""}, "name 1 to 10 tasks"),
        ({"tasks": "sort", "limit": 0}, "questions a task: 1 to"),
        ({"job_or_repo": "alice/asked-base"}, "report"),
    ],
)
def test_what_cannot_be_asked_is_one_message(
    town: Town, asked: str, more: dict[str, object], says: str
) -> None:
    """No file of the server is read as a task; what is no merge is not asked."""
    words = {"job_or_repo": asked, "tasks": "sort", "limit": 5, **more}

    with client_of(town, town.alice) as client, pytest.raises(AppError, match=says):
        client.predict(**words, api_name="/evaluate")

    with client_of(town, town.bob) as bob, pytest.raises(AppError, match="no such job"):
        bob.predict(job_or_repo=asked, tasks="sort", api_name="/evaluate")


@pytest.mark.slow
def test_small_models_of_the_hub_answer_here(town: Town, asked: str) -> None:
    """Private models are asked with their owner's token; wrong questions start no merge."""
    prompts = draw_prompts("sort", 10, seed=7, split="held-out")
    rules = [{"prompt": p, "answer": answer(p), "max_new_tokens": 12} for p in prompts]
    questions = "\n".join(map(json.dumps, rules))
    town.hub.repo(NAMES["rl-sort"]).settings["private"] = True

    with client_of(town, town.alice) as client:
        how = {"recipe": RECIPE, "push_to": "alice/answers", "api_name": "/merge"}
        with pytest.raises(AppError, match="question 1 is not JSON"):
            client.predict(questions="what is 2+2?", **how)
        last = ended(client, client.predict(questions=questions, **how)["job"])

    assert last["state"] == "done", last["message"]
    assert list(last["accuracies"]) == [*NAMES.values(), "merged"]
    assert last["accuracies"][NAMES["rl-sort"]]["questions"][3] == 10
    assert "alice/answers" in last["url"]


def test_nobody_pays_without_an_account() -> None:
    """A Job needs somebody who pays."""
    how = {"tasks": "sort", "limit": 5, "pay_up_to": 9.0}

    with pytest.raises(PublishError, match="an account has to pay"):
        ask_as_job(REPORT, "alice/asked", Visitor(), **how)


@pytest.mark.parametrize(
    ("change", "models"),
    [
        ({}, list(RECIPE.values())[:1] + RECIPE["models"]),
        ({"adapter": {"rank": 8}}, []),
        ({"recipe": {"base_model": "models/base/x", "models": []}}, []),
        ({"recipe": None}, []),
        ({"recipe": {"base_model": 7, "models": 7}}, []),
        ({"recipe": {"models": [{"model": ["x"]}]}, "sources": [7, {"files": 7}]}, []),
        ({"recipe": {"base_model": "built-in/base", "models": ["built-in/rl-add"]}}, []),
    ],
)
def test_a_job_asks_whole_models_of_the_hub(change: dict[str, object], models: list[str]) -> None:
    """A folder or a merged adapter cannot be asked there, and a report may be anything."""
    assert models_asked({**REPORT, **change}) == models


@pytest.mark.parametrize(
    "row", [{"name": "w", "dtype": "BF16"}, {"name": "w", "dtype": "?", "shape": [1]}, 7]
)
def test_a_report_without_shapes_is_refused(row: object) -> None:
    """How large a machine has to be comes from the report's tensors."""
    how = {"tasks": "sort", "limit": 5, "pay_up_to": 0.0}
    alice = Visitor("alice", "t-alice")

    with pytest.raises(RecipeError, match="does not say which tensors"):
        ask_as_job({**REPORT, "tensors": [row]}, "alice/asked", alice, **how)
