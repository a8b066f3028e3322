"""An evaluation on its way to a published merge: a pull request with card, report and results."""

import json

import pytest
import yaml

from loopback_hub import LoopbackHub
from resmerge_stream import Recipe, plan_merge, run_merge
from resmerge_stream.errors import CheckpointNotFoundError, RecipeError
from resmerge_stream.evaluation.proposal import propose
from resmerge_stream.evaluation.results import evaluation
from resmerge_stream.experts.group import builtin_group
from resmerge_stream.recipe import ModelRef

GROUP = builtin_group()
NAME = "alice/merged"
DOCUMENT = evaluation({"base": {"gsm": [True, False], "own": [True, False]},
                       NAME: {"gsm": [True, True], "own": [False, False]}})  # fmt: skip


@pytest.fixture(scope="module")
def merged(tmp_path_factory):
    """A merge in a folder."""
    folder = tmp_path_factory.mktemp("merge") / "merged"
    experts = tuple(ModelRef(str(GROUP[name])) for name in ("rl-sort", "rl-add"))
    recipe = Recipe(ModelRef(str(GROUP["base"])), experts, "mean")
    list(run_merge(plan_merge(recipe, out=folder), out=folder))
    return folder


@pytest.fixture
def hub(tmp_path, merged, monkeypatch):
    """A Hub with that merge, and its owner's token as the machine's."""
    with LoopbackHub(tmp_path / "hub") as hub:
        token = hub.add_user("alice")
        hub.add_repo(NAME, merged, private=True)
        for key, value in hub.env(token, home=tmp_path / "home").items():
            monkeypatch.setenv(key, value)
        template = "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.endpoint)
        monkeypatch.setattr(
            "huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", hub.endpoint + template
        )
        hub.token = token
        yield hub


def proposed(hub, name=NAME, document=DOCUMENT, datasets=None):
    """Open a pull request with the owner's token."""
    return propose(name, document, datasets or {}, name=NAME, token=hub.token)


def test_a_pull_request_has_card_report_and_results(hub):
    """Main stays as it is; the branch's card has the numbers, for the Hub's benchmarks as well."""
    before = hub.files(NAME)

    page = proposed(hub, datasets={"gsm": "openai/gsm8k"})

    repo = hub.repo(NAME)
    files = repo.at("refs/pr/1").files
    assert page.endswith(f"/{NAME}/discussions/1")
    assert hub.files(NAME) == before
    assert set(files) == {*before, ".eval_results/resmerge-stream.yaml"}

    def read(path):
        return hub._services.objects.path(files[path].sha256).read_text()

    assert "## Evaluation" in read("README.md")
    told = json.loads(read("resmerge/report.json"))["evaluation"]["models"]
    assert told[NAME]["gsm"]["accuracy"] == 1
    (entry,) = yaml.safe_load(read(".eval_results/resmerge-stream.yaml"))
    assert entry == {"dataset": {"id": "openai/gsm8k", "task_id": "gsm"}, "value": 1.0}


def test_the_same_results_are_proposed_once(hub):
    """Asked again, it is the open pull request; other results are another one."""
    first = proposed(hub)

    again = proposed(hub)
    other = proposed(hub, document=evaluation({"base": {"gsm": [True]}, NAME: {"gsm": [True]}}))

    assert again == first
    assert other != first


def test_what_is_no_merge_on_the_hub_is_one_message(hub):
    """A repository that is not there, and one without a report, are refused."""
    hub.add_repo("alice/plain", {"README.md": b"hello"}, private=True)

    with pytest.raises(CheckpointNotFoundError, match="no model"):
        proposed(hub, "alice/nobody")
    with pytest.raises(RecipeError, match="of a merge"):
        proposed(hub, "alice/plain")
