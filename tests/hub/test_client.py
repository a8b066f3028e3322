"""Whatever a Hub, or something on the way to it, answers: one kind of error, and no traceback."""

import json
from collections.abc import Callable, Iterator
from typing import Any

import httpx2
import pytest
from huggingface_hub import CommitOperationAdd
from huggingface_hub.utils import close_session
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from loopback_hub import LoopbackHub
from loopback_hub.faults import Answer
from resmerge_stream.errors import ResMergeError
from resmerge_stream.hub import client as hub_client
from resmerge_stream.hub.account import rights_missing, seconds_left, whoami
from resmerge_stream.hub.answers import StrangeAnswerError, check_answer
from resmerge_stream.hub.patience import PATIENCE
from resmerge_stream.hub.repo import HubRepo, listed, sha256_of
from resmerge_stream.recipe import ModelRef
from resmerge_stream.sources import open_checkpoint

TOKEN = "hf_alice_alice"
ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=8,
)


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LoopbackHub]:
    """A Hub with a small model."""
    with LoopbackHub(tmp_path_factory.mktemp("answers")) as hub:
        hub.add_user("alice", TOKEN)
        hub.add_repo(
            "alice/model", {"config.json": b"{}", "model.safetensors": b"\x02" + b"\0" * 7 + b"{}"}
        )
        yield hub


@pytest.fixture
def repo(hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubRepo]:
    """The model, asked for by a client that waits for nothing."""
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.endpoint)
    monkeypatch.setattr(hub_client, "wait_seconds", lambda *_: 0.0)
    close_session()
    with PATIENCE.of(0.0):
        yield HubRepo(hub_client.client(TOKEN), "alice/model")
    hub.faults.clear()


def look(repo: HubRepo) -> None:
    """Read everything of a repository's answer that is read anywhere."""
    info = repo.info()
    if info is not None:
        assert all(
            sha256_of(file) is None or isinstance(file.size, int) for file in listed(info).values()
        )


def account(repo: HubRepo) -> None:
    """Read everything of an account that is read anywhere."""
    answer = whoami(repo.api)
    rights_missing(answer, "alice/model")
    seconds_left(answer)


def commit(repo: HubRepo) -> None:
    """Commit one small file."""
    repo.commit(
        "main", lambda: [CommitOperationAdd("x.txt", b"x")], parent="0" * 40, message="x", proof={}
    )


def checkpoint(repo: HubRepo) -> None:
    """Open it as a model to merge."""
    open_checkpoint(ModelRef(repo.id), token=TOKEN).close()


def error_of(call: Callable[[], Any]) -> str:
    """What an error of ours says, which a call raised; nothing if it raised none."""
    try:
        call()
    except ResMergeError as exc:
        return str(exc)
    return ""


CALLS: dict[str, tuple[str, Callable[[HubRepo], Any]]] = {
    "a model": (r"/api/models/alice/model/revision", look),
    "a checkpoint": (r"/api/models/alice/model", checkpoint),
    "an account": (r"whoami", account),
    "branches": (r"/refs", HubRepo.branches),
    "files": (r"/paths-info", lambda repo: repo.holds("main", {"config.json": b"{}"})),
    "an upload": (r"/preupload", commit),
    "a commit": (r"/commit/", commit),
    "pull requests": (r"/discussions", lambda repo: repo.pull_requests("alice", limit=3)),
    "a new repository": (r"/api/repos/create", HubRepo.create),
}  # fmt: skip
SEEN = [
    [], None, 5, "x", {}, {"success": True}, {"sha": 5}, {"siblings": [1, 2]},
    {"id": "alice/model", "sha": "0" * 40, "siblings": [{"rfilename": "a", "size": "5"}]},
    {"id": "alice/model", "sha": "0" * 40, "siblings": [{"rfilename": "a", "size": -5}]},
    {"id": "alice/model", "sha": 7, "siblings": []},
    {"name": ["alice"]}, {"name": "alice", "orgs": [1]}, {"commitUrl": "x", "commitOid": None},
]  # fmt: skip


@pytest.mark.parametrize("what", CALLS)
@pytest.mark.parametrize("answer", SEEN, ids=repr)
def test_an_answer_of_another_form_is_said_to_be_none_of_the_hubs(
    hub: LoopbackHub, repo: HubRepo, what: str, answer: object
) -> None:
    """Every call either understands what it is answered, or ends in an error of ours."""
    path, call = CALLS[what]
    hub.faults.clear()
    rule = hub.faults.add(Answer(status=200, page=json.dumps(answer)), path=path)

    said = error_of(lambda: call(repo))

    assert rule.hits
    assert "hf_" not in said


@pytest.mark.parametrize("what", CALLS)
@settings(max_examples=25, deadline=None, derandomize=True,
          suppress_health_check=[HealthCheck.function_scoped_fixture])  # fmt: skip
@given(answer=ANY_JSON)
def test_any_json_ends_in_an_error_of_ours(
    hub: LoopbackHub, repo: HubRepo, what: str, answer: object
) -> None:
    """Random JSON in place of the Hub's answer raises nothing else."""
    path, call = CALLS[what]
    hub.faults.clear()
    rule = hub.faults.add(Answer(status=200, page=json.dumps(answer)), path=path)

    said = error_of(lambda: call(repo))

    assert rule.hits
    assert "hf_" not in said


def answered(method: str, path: str, value: object) -> httpx2.Response:
    """An answer, as the client hands it to its hooks."""
    request = httpx2.Request(method, f"https://huggingface.co{path}")
    return httpx2.Response(200, json=value, request=request)


@pytest.mark.parametrize(
    "links",
    [{"href": 5}, {"href": "file:///x"}, {"href": "https:///x"}, {"href": "//x"}, {"header": {}}],
)
def test_a_link_to_upload_to_is_an_address(links: dict[str, object]) -> None:
    """A batch of large files names where each goes, and that is an address of the web."""
    value = {"objects": [{"oid": "a", "size": 1, "actions": {"upload": links}}]}

    with pytest.raises(StrangeAnswerError):
        check_answer(answered("POST", "/a/b.git/info/lfs/objects/batch", value))


def test_what_the_hub_answers_passes(repo: HubRepo) -> None:
    """Without a fault every call works: the forms refuse nothing that is the Hub's own."""
    look(repo)
    account(repo)
    assert "main" in repo.branches()
    assert repo.pull_requests("alice", limit=3) == []
    assert repo.holds("main", {"config.json": b"{}"})
    assert not repo.create()


def test_a_wait_longer_than_the_patience_is_not_begun(hub: LoopbackHub, monkeypatch) -> None:
    """Where the Hub asks for a day, planning says so at once: nobody waits longer than promised."""
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.endpoint)
    close_session()
    hub.faults.add(Answer(status=503, headers={"Retry-After": "100000"}), path="/api/models")
    hub.log.clear()

    with pytest.raises(ResMergeError, match="answers 503"):
        open_checkpoint(ModelRef("alice/model"), token=TOKEN)

    assert len(hub.log.find(path="/api/models/alice/model")) == 1
    hub.faults.clear()
