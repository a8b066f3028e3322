"""Methods advised and compared on the Space: merges' queue and limits, scores, no model."""

import json
import time

import pytest

from resmerge_stream import plan_merge
from resmerge_stream.errors import PublishError, RecipeError
from resmerge_stream.experts.group import built_in_recipe
from resmerge_stream.experts.tasks import answer, draw_prompts
from resmerge_stream.methods import find_methods
from resmerge_stream.studies.advice import advise, read_regime
from space.asked import web_request
from space.examples import examples
from space.identity import Visitor
from space.jobs.records import ACTIVE
from space.service import Service
from space.settings import Settings
from space.view import jobs as view
from space.view.plan import advice_html

PATIENCE_S = 240.0  # a busy machine is slow
ALICE = Visitor("alice", "t-alice")
METHODS = ["mean", "ties"]
MODELS = [examples()[0].base, *examples()[0].experts[:2]]
BUILT_IN = {"recipe": {"base_model": MODELS[0], "models": MODELS[1:]}}
HUB = {"recipe": {"base_model": "alice/base", "models": ["alice/a", "alice/b"]}}
QUESTIONS = "\n".join(
    json.dumps({"prompt": p, "answer": answer(p), "max_new_tokens": 12})
    for p in draw_prompts("sort", 6, seed=7, split="held-out")
)


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    """A Space that asks the built-in models four questions a task; two jobs an account."""
    folder = tmp_path_factory.mktemp("space")
    made = Service.of(Settings(folder=folder, prompts=4, jobs_per_user=2, anonymous_jobs=2))
    yield made
    made.close()


def compared(service, document, methods, visitor, **how):
    """Ask for a comparison, wait for its end, and return the job."""
    asked = web_request(document, service.settings)
    job = service.compare(asked, methods, visitor, **how)
    deadline = time.monotonic() + PATIENCE_S
    while job.state in ACTIVE:
        assert time.monotonic() < deadline, job.log
        time.sleep(0.05)
    return job


@pytest.mark.parametrize("questions", ["", QUESTIONS])
def test_base_experts_and_each_merge_are_asked_the_same(service, questions):
    """Without an account on the built-in models: scores side by side, the best named, no files."""
    job = compared(service, BUILT_IN, METHODS, Visitor(), key="k", questions=questions)

    assert job.state == "done", job.log
    assert [name.rpartition("/")[2] for name in job.accuracies] == [
        *(name.rpartition("/")[2] for name in MODELS), "Mean", "TIES",
    ]  # fmt: skip
    tasks = {tuple(row) for row in job.accuracies.values()}
    assert len(tasks) == 1
    assert {row[3] for rows in job.accuracies.values() for row in rows.values()} == {
        6.0 if questions else 4.0
    }
    assert job.choice.startswith("best: ")
    assert not service.jobs.result(job).exists()
    assert not list(service.settings.folder.rglob("*.safetensors"))
    assert not service.downloads.of(job)
    html = view.result_html(job)
    assert html.count("<li") == len(MODELS) + len(METHODS)
    assert html.count("class=rm-own") == 1
    assert "2 experts of built-in/base: Mean, TIES compared" in view.title_of(job.asked)


@pytest.mark.parametrize(
    ("methods", "questions", "says"),
    [
        ([], "", "choose 2 to 4 methods"),
        (["mean"], "", "choose 2 to 4 methods"),
        (["mean", "mean"], "", "choose 2 to 4 methods"),
        (["mean", "ties", "ram", "sce", "star"], "", "choose 2 to 4 methods"),
        (["mean", "nothing"], "", "no method 'nothing'"),
        (["mean", "../ties"], "", "no method"),
        (METHODS, QUESTIONS.splitlines()[0], "two or more questions"),
        (METHODS, "what is 2+2?", "question 1 is not JSON"),
    ],
)
def test_a_comparison_that_cannot_be_is_refused(service, methods, questions, says):
    """Before anything is queued."""
    asked = web_request(BUILT_IN, service.settings)

    with pytest.raises(RecipeError, match=says):
        service.compare(asked, methods, Visitor(), questions=questions)


def test_strangers_get_no_more_by_it_than_by_a_merge(service, monkeypatch):
    """Models of the Hub need an account and questions, and the caps are those of merges."""
    hub = web_request(HUB, service.settings)
    with pytest.raises(PublishError, match="without an account"):
        service.compare(hub, METHODS, Visitor(), questions=QUESTIONS)
    with pytest.raises(RecipeError, match="should be asked is missing"):
        service.compare(hub, METHODS, ALICE)

    monkeypatch.setattr(service.jobs, "_enqueue", lambda job, token, address="": None)
    built_in = web_request(BUILT_IN, service.settings)
    service.submit(built_in, ALICE)
    service.compare(built_in, METHODS, ALICE)
    with pytest.raises(RecipeError, match="allowed at a time"):
        service.compare(built_in, METHODS, ALICE)


def test_models_too_slow_to_be_asked_are_not_merged(tmp_path, monkeypatch):
    """What would hold up the others is refused before a weight is read."""
    monkeypatch.setenv("RESMERGE_SPACE_ASK_SECONDS", "0")
    made = Service.of(Settings(folder=tmp_path / "space", ask_seconds=0.01))
    try:
        job = compared(made, BUILT_IN, METHODS, ALICE, questions=QUESTIONS)
    finally:
        made.close()

    assert job.state == "failed"
    assert "Ask them as a Job" in job.message
    assert job.bytes_read == 0


def test_the_built_in_experts_get_the_advice_of_the_command_line(service):
    """Their weights are read once for the page; models of the Hub are not read by a plan."""
    regime = [event for *_, event in read_regime(plan_merge(built_in_recipe()).accepted())][-1]
    everyone = {"recipe": examples()[0].recipe}

    found = service.advice(everyone, Visitor())

    assert found["candidates"] == list(advise(regime).to_dict()["candidates"])
    assert 2 <= len(found["candidates"]) <= 3
    assert service.advice(everyone, Visitor()) is found
    assert service.advice(HUB, ALICE) == {}
    html = advice_html(found)
    for one in found["candidates"]:
        assert find_methods()[one["method"]].title in html
