"""The staging branch: shared by the processes of one run, closed to every other run."""

import hashlib
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import CommitOperationAdd, HfApi

from loopback_hub import Hook, LoopbackHub
from resmerge_stream.errors import StoppedError
from resmerge_stream.hub.repo import HubRepo
from resmerge_stream.sinks.hub.staging import Staging, read_staged
from resmerge_stream.sinks.sink import Membership

PLAN = "0123456789abcdef"


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LoopbackHub]:
    """A Hub with an account that may write."""
    with LoopbackHub(tmp_path_factory.mktemp("staging")) as hub:
        yield hub


@pytest.fixture
def repo(hub: LoopbackHub, tmp_path: Path) -> HubRepo:
    """A repository of its own for each test."""
    name = hashlib.sha256(str(tmp_path).encode()).hexdigest()[:8]
    api = HfApi(endpoint=hub.endpoint, token=hub.add_user(f"user-{name}"))
    repo = HubRepo(api, f"user-{name}/model")
    repo.create()
    return repo


def open_staging(repo: HubRepo, mark: str, *, is_main: bool) -> Staging:
    """Take hold of the branch as a process of the run with that mark."""
    return Staging(repo, PLAN, {}, Membership(mark, is_main, is_main), made_repo=False)


def name_of(number: int) -> str:
    """Return the name of a shard."""
    return f"model-{number:05}.safetensors"


def stage(staging: Staging, number: int) -> None:
    """Commit a small shard."""
    name, data = name_of(number), b"%05d" % number * 200
    entry = {"name": name, "size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    staging.stage(CommitOperationAdd(name, data), {**entry, "tensors": []})


def test_processes_of_one_run_commit_to_the_same_branch(repo: HubRepo) -> None:
    """Commits that meet are repeated on top of each other until all shards are staged."""
    main = open_staging(repo, "mark", is_main=True)
    others = [open_staging(repo, "mark", is_main=False) for _ in range(2)]
    failed: list[BaseException] = []

    def work(first: int, staging: Staging) -> None:
        try:
            for number in range(first, first + 3):
                stage(staging, number)
        except BaseException as exc:
            failed.append(exc)

    threads = [
        threading.Thread(target=work, args=(10 * number, staging))
        for number, staging in enumerate([main, *others])
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    staged = read_staged(repo, PLAN)
    assert not failed
    assert staged is not None
    assert len(staged.entries) == 9


def test_another_run_of_the_same_merge_stops_every_process_of_the_first(repo: HubRepo) -> None:
    """The mark is the run's: who does not have it finds the branch taken over, and stops."""
    main = open_staging(repo, "first", is_main=True)
    other = open_staging(repo, "first", is_main=False)
    stage(other, 1)
    second = open_staging(repo, "second", is_main=True)
    stage(second, 2)

    for staging in (main, other):
        with pytest.raises(StoppedError, match="another run"):
            stage(staging, 3)

    staged = read_staged(repo, PLAN)
    assert staged is not None
    assert set(staged.entries) == {"model-00001.safetensors", "model-00002.safetensors"}


def test_shards_that_come_during_a_commit_share_the_next_one(
    hub: LoopbackHub, repo: HubRepo
) -> None:
    """However many wait while one commits, all of them are in the commit after it."""
    staging = open_staging(repo, "mark", is_main=True)
    go_on, held = threading.Event(), threading.Event()
    hub.faults.add(Hook(call=lambda: (held.set(), go_on.wait(60))), path="/commit/res", times=1)
    threads = [threading.Thread(target=stage, args=(staging, number)) for number in range(5)]
    threads[0].start()
    assert held.wait(60)
    for thread in threads[1:]:
        thread.start()
    while len(staging._waiting) < 5:
        time.sleep(0.01)
    go_on.set()
    for thread in threads:
        thread.join()

    staged = read_staged(repo, PLAN)
    titles = [c.title for c in repo.api.list_repo_commits(repo.id, revision=staging.branch)]
    assert staged is not None
    assert set(staged.entries) == set(staging.entries) == {name_of(n) for n in range(5)}
    assert titles[:2] == ["Stage 4 shards", f"Stage {name_of(0)}"]


def test_a_failed_commit_fails_every_shard_in_it(hub: LoopbackHub, repo: HubRepo) -> None:
    """Who waits for a commit never takes another's failure for its own shard's success."""
    staging = open_staging(repo, "mark", is_main=True)
    open_staging(repo, "other", is_main=True)  # takes the branch over
    failed: list[int] = []

    def work(number: int) -> None:
        try:
            stage(staging, number)
        except StoppedError:
            failed.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert sorted(failed) == [0, 1, 2]
    assert not staging.entries
    assert not staging._waiting
