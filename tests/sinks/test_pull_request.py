"""Publishing as a pull request, into a collection, with a discussion: resumable like all else."""

import hashlib
import signal
from collections.abc import Iterator

import pytest

from loopback_hub import Answer, Hook
from tests.support.hub_runs import Bench, Run, running_bench

CREATES_PR = r"/commit/main\?create_pr"


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    """A Hub with alice's models; what carol has, alice may read and not write."""
    with running_bench(tmp_path_factory.mktemp("offered")) as bench:
        bench.hub.add_user("carol")
        yield bench


@pytest.fixture(autouse=True)
def _no_faults(bench: Bench) -> Iterator[None]:
    bench.hub.log.clear()
    for name, data in bench.expected().items():
        if name.endswith(".safetensors"):
            path = bench.hub._services.objects.path(hashlib.sha256(data).hexdigest())
            path.unlink(missing_ok=True)
    yield
    bench.hub.faults.clear()


def uploads(bench: Bench) -> int:
    """How many large files the Hub took."""
    return len(bench.hub.log.find(method="PUT", path="/upload/", status=200))


def carols(bench: Bench, name: str) -> str:
    """A public model of carol's, with something that a merge replaces, removes and keeps."""
    repo_id = f"carol/{name}"
    files = {"config.json": b"{}", "old.safetensors": b"x" * 600, "notes.md": b"hers"}
    bench.hub.add_repo(repo_id, files)
    return repo_id


def offer(bench: Bench, repo_id: str, *options: str) -> Run:
    """Merge into a pull request, as alice."""
    return bench.merge("--push-to", repo_id, "--create-pr", *options)


def offered(bench: Bench, repo_id: str, number: int = 1) -> dict[str, bytes]:
    """What a pull request holds, but for the card and git's own."""
    ref = f"refs/pr/{number}"
    names = [name for name in bench.hub.files(repo_id, ref) if "/" not in name]
    kept = [name for name in names if name not in ("README.md", ".gitattributes")]
    return {name: bench.hub.read(repo_id, name, ref) for name in kept}


def staging(bench: Bench) -> list[str]:
    """The private repositories that runs made for their staging."""
    repos = bench.hub._services.store.repos("models")
    return [repo.id for repo in repos if "-resmerge-" in repo.id]


def test_a_pull_request_holds_the_merge_and_main_is_as_it_was(bench: Bench) -> None:
    """Who may only read opens one: whole, on top of main; nothing else there changes or stays."""
    repo_id = carols(bench, "hers")
    before = bench.hub.repo(repo_id).refs()

    done = offer(bench, repo_id)

    assert done.code == 0, done.err
    assert done.last["where"] == f"{bench.hub.endpoint}/{repo_id}/discussions/1"
    refs = bench.hub.repo(repo_id).refs()
    assert set(refs) - set(before) == {"refs/pr/1"}
    assert {name: refs[name] for name in before} == before
    assert offered(bench, repo_id) == {**bench.expected(), "notes.md": b"hers"}
    assert staging(bench) == []


@pytest.mark.slow
def test_with_xet_the_shards_reach_a_pull_request_by_reference(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """Sent once, into one's own staging; somebody else's repository takes them over unsent."""
    with running_bench(tmp_path_factory.mktemp("xet"), xet=True) as bench:
        bench.hub.add_user("carol")
        repo_id = carols(bench, "over-xet")

        done = offer(bench, repo_id)

        assert done.code == 0, done.err
        assert offered(bench, repo_id) == {**bench.expected(), "notes.md": b"hers"}
        assert staging(bench) == []
        assert uploads(bench) == 0
        moved = [e for e in bench.hub.log if "lfs-copy" in e.path or "xet" in e.path]
        assert moved


def test_the_plan_says_what_a_pull_request_replaces(bench: Bench) -> None:
    """As for an update: the files are named before a tensor moves."""
    repo_id = carols(bench, "listed")

    done = bench.run("plan", *bench.sources(), "--push-to", repo_id, "--create-pr", "--json")

    warnings = " ".join(done.last["warnings"])
    assert f"the pull request replaces in {repo_id}: config.json" in warnings
    assert f"the pull request removes from {repo_id}: old.safetensors" in warnings


@pytest.mark.slow
def test_the_same_command_finds_its_pull_request(bench: Bench) -> None:
    """Nothing is merged or opened a second time while it is open; a closed one is made anew."""
    repo_id = carols(bench, "again")
    offer(bench, repo_id)
    bench.hub.log.clear()

    done = offer(bench, repo_id)

    assert (done.code, done.last["already_there"]) == (0, True)
    assert done.last["where"].endswith("/discussions/1")
    assert not bench.hub.log.find(path="/commit/|/upload/")
    bench.hub.repo(repo_id).update_settings(closed=[1])
    assert offer(bench, repo_id).last["where"].endswith("/discussions/2")


@pytest.mark.slow
def test_a_killed_run_goes_on_and_sends_nothing_twice(bench: Bench) -> None:
    """Killed when all shards wait: the next run sends none again, and opens one pull request."""
    repo_id = carols(bench, "killed")
    process = bench.start(
        ["merge", *bench.sources(), "--push-to", repo_id, "--create-pr", "--json"]
    )
    kill = Hook(call=lambda: process.send_signal(signal.SIGKILL))
    bench.hub.faults.add(kill, path=CREATES_PR, times=1)
    bench.hub.faults.add(Answer(status=500), path=CREATES_PR)  # killed before it is handled
    process.communicate(timeout=200)
    bench.hub.faults.clear()
    assert process.returncode == -signal.SIGKILL
    assert staging(bench) != []
    bench.hub.log.clear()

    done = offer(bench, repo_id)

    assert done.code == 0, done.err
    shards = [name for name in bench.expected() if name.endswith(".safetensors")]
    assert uploads(bench) < len(shards)  # the picture is a large file too
    assert offered(bench, repo_id) == {**bench.expected(), "notes.md": b"hers"}
    assert staging(bench) == []


def test_a_lost_answer_opens_no_second_pull_request(bench: Bench) -> None:
    """The Hub opened it and its answer was lost: it is found instead of opened again."""
    repo_id = carols(bench, "lost")
    bench.hub.faults.add(Answer(status=503), path=CREATES_PR, times=1, after=True)

    done = offer(bench, repo_id)

    assert done.code == 0, done.err
    assert done.last["where"].endswith("/discussions/1")
    assert [ref for ref in bench.hub.repo(repo_id).refs() if "/pr/" in ref] == ["refs/pr/1"]


@pytest.mark.slow
def test_discarding_removes_the_staging_of_a_pull_request(bench: Bench) -> None:
    """The private repository goes, whoever's the target is; the target is not asked for more."""
    repo_id = carols(bench, "discarded")
    bench.hub.faults.add(Answer(status=403), path=CREATES_PR)
    stopped = offer(bench, repo_id)
    assert (stopped.code, len(staging(bench))) == (3, 1)
    bench.hub.faults.clear()

    done = offer(bench, repo_id, "--discard-staging")

    assert done.code == 0, done.err
    assert staging(bench) == []


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--push-to", "carol/nothing", "--create-pr"], "nothing to open a pull request on"),
        (["--push-to", "carol/closed", "--create-pr"], "takes no discussions"),
        (["--push-to", "carol/closed"], "cannot publish under 'carol'"),
        (["--push-to", "alice/x", "--collection", "carol/hers-1"], "you may not add to it"),
        (["--push-to", "alice/x", "--collection", "alice/none-1"], "there is no collection"),
        (["--push-to", "alice/x", "--collection", "mine"], "Write owner/title-id"),
        (["--push-to", "alice/x", "--create-pr", "--update"], "does not change the repository"),
        (["--push-to", "alice/x", "--create-pr", "--discuss"], "is already a discussion"),
    ],
)
def test_what_cannot_be_published_is_refused_first(
    bench: Bench, options: list[str], words: str
) -> None:
    """Before a tensor moves and before anything is made: what is wrong, and what to do."""
    if not bench.hub.has_repo("carol/closed"):
        bench.hub.add_repo("carol/closed", {"config.json": b"{}"})
        bench.hub.repo("carol/closed").update_settings(discussions_disabled=True)
    bench.hub.recorded.collections["carol/hers-1"] = []

    done = bench.merge(*options)

    assert done.code == 2
    assert words in done.out + done.err
    assert not bench.hub.has_repo("alice/x")


def test_a_model_is_added_to_a_collection_and_discussed_once(bench: Bench) -> None:
    """At the very end; and the same command again adds and posts nothing."""
    bench.hub.recorded.collections["alice/merges-1"] = []
    address = f"{bench.hub.endpoint}/collections/alice/merges-1"
    options = ("--push-to", "alice/told", "--collection", address, "--discuss")

    done = [bench.merge(*options) for _ in range(2)]

    assert [run.code for run in done] == [0, 0], done[0].err + done[1].err
    assert bench.hub.recorded.collections["alice/merges-1"] == ["alice/told"]
    (post,) = bench.hub.repo("alice/told").settings["posts"]
    assert "The merge is done" in post["said"]
    assert "alice/expert0" not in post["said"]


def test_what_a_killed_run_left_out_is_done_by_the_next(bench: Bench) -> None:
    """Published, but not in the collection yet: the same command adds it and merges nothing."""
    bench.hub.recorded.collections["alice/later-1"] = []
    options = ("--push-to", "alice/late", "--collection", "alice/later-1")
    bench.hub.faults.add(Answer(status=403), path="/items")
    assert bench.merge(*options).code == 3
    bench.hub.faults.clear()
    bench.hub.log.clear()

    done = bench.merge(*options)

    assert (done.code, done.last["already_there"]) == (0, True)
    assert bench.hub.recorded.collections["alice/later-1"] == ["alice/late"]
    assert uploads(bench) == 0
