"""A target that others change while a merge runs, or that holds what no merge writes."""

import hashlib
import json
import signal
import threading
from pathlib import Path

import pytest

from loopback_hub import Answer, Hold, Hook
from tests.support.hub_runs import Bench, Run

pytestmark = pytest.mark.usefixtures("clean_hub")


def staging_branch(bench: Bench, repo_id: str) -> str:
    """The name of the staging branch in a repository."""
    refs = bench.hub.repo(repo_id).refs()
    return next(ref for ref in refs if "resmerge-" in ref).removeprefix("refs/heads/")


def uploads(bench: Bench) -> int:
    """How many uploads of large files the Hub took."""
    return len(bench.hub.log.find(method="PUT", path="/upload/", status=200))


def staged_and_killed(bench: Bench, repo_id: str, *options: str) -> None:
    """Start a merge that is killed when everything is staged, before its last commit."""
    process = bench.start(["merge", *bench.sources(), "--push-to", repo_id, *options, "--json"])
    bench.hub.faults.add(
        Hook(call=lambda: process.send_signal(signal.SIGKILL)), path="/commit/main", times=1
    )
    bench.hub.faults.add(Answer(status=500), path="/commit/main")  # killed before it is handled
    process.communicate(timeout=200)
    bench.hub.faults.clear()
    assert process.returncode == -signal.SIGKILL


@pytest.mark.slow
def test_a_shard_replaced_on_the_branch_is_not_published(bench: Bench) -> None:
    """Another writer replaces a staged shard before the last commit: it is made and sent again."""
    name = next(n for n in bench.expected() if n.endswith(".safetensors"))

    def replace() -> None:
        branch = staging_branch(bench, "alice/replaced")
        bench.hub.push("alice/replaced", {name: b"x" * 600}, branch=branch)

    bench.hub.faults.add(
        Hook(call=replace), method="POST", path="/commit/resmerge", after=True, skip=2, times=1
    )

    done = bench.merge("--push-to", "alice/replaced")

    assert done.code == 0, done.err
    assert bench.published("alice/replaced") == bench.expected()


@pytest.mark.slow
def test_a_public_target_without_xet_is_filled(bench: Bench) -> None:
    """Where nothing can be copied between repositories, shards wait where they will stand."""
    bench.hub.add_repo("alice/public-lfs", {".gitattributes": b""})
    staged_and_killed(bench, "alice/public-lfs")
    assert set(bench.hub.files("alice/public-lfs")) == {".gitattributes"}
    assert list(bench.hub.repo("alice/public-lfs").refs()) == ["refs/heads/main"]
    sent = uploads(bench)

    done = bench.merge("--push-to", "alice/public-lfs")

    assert done.code == 0, done.err
    assert bench.published("alice/public-lfs") == bench.expected()
    assert uploads(bench) <= sent + 1  # the picture
    assert [r.id for r in bench.hub._services.store.repos("models") if "resmerge" in r.id] == []


@pytest.mark.slow
def test_what_the_storage_forgot_is_sent_again(bench: Bench) -> None:
    """Shards that no commit names may be cleared away before the last commit."""
    bench.hub.add_repo("alice/cleared", {".gitattributes": b""})
    staged_and_killed(bench, "alice/cleared")
    bench.forget_uploads()

    done = bench.merge("--push-to", "alice/cleared")

    assert done.code == 0, done.err
    assert bench.published("alice/cleared") == bench.expected()


@pytest.mark.slow
def test_a_last_commit_that_lands_late_is_success(bench: Bench) -> None:
    """Killed while its last commit is on the way, which lands while the next run works."""
    lands, landed = threading.Event(), threading.Event()
    arguments = ["merge", *bench.sources(), "--push-to", "alice/late", "--json"]
    first = bench.start(arguments)
    bench.hub.faults.add(
        Hook(call=lambda: first.send_signal(signal.SIGKILL)), path="/commit/main", times=1
    )
    bench.hub.faults.add(Hold(until=lands), path="/commit/main", times=1)
    bench.hub.faults.add(Hook(call=landed.set), path="/commit/main", times=1, after=True)
    first.communicate(timeout=200)

    def land() -> None:
        lands.set()
        assert landed.wait(120)

    bench.hub.faults.add(Hook(call=land), method="POST", path="/commit/resmerge", times=1)
    done = bench.fresh(arguments)

    assert done.code == 0, done.err
    assert landed.is_set()
    assert bench.published("alice/late") == bench.expected()
    assert bench.history("alice/late") == ["Merge with ResMerge Stream", "initial commit"]


@pytest.mark.parametrize(
    "report",
    [b"[]", b"{", b'{"plan_hash": "PLAN"}', b'{"plan_hash": "PLAN", "files": "x"}',
     b'{"plan_hash": "PLAN", "files": [1]}', b'{"plan_hash": "PLAN", "files": [{"name": 3}]}'],
)  # fmt: skip
def test_a_malformed_report_at_the_target_is_somebody_elses_file(
    bench: Bench, report: bytes
) -> None:
    """Whatever stands in `report.json`, the target is refused in one message."""
    repo_id = f"alice/report-{hashlib.sha256(report).hexdigest()[:8]}"
    plan_hash = plan_of(bench, repo_id)
    content = report.replace(b"PLAN", plan_hash.encode())
    bench.hub.add_repo(repo_id, {"resmerge/report.json": content}, private=True)

    refused(bench.merge("--push-to", repo_id), "not make")


@pytest.mark.slow
@pytest.mark.parametrize(
    "head",
    [b"[]", b"{", b'{"plan_hash": "PLAN", "identity": "x"}', b'{"plan_hash": "PLAN", "owner": []}',
     b'{"plan_hash": "PLAN", "identity": {"0": 3}}',
     b'{"plan_hash": "PLAN", "identity": {"x": {}}}',
     b'{"plan_hash": "PLAN", "identity": {"0": {"commit": {}}}}'],
)  # fmt: skip
def test_a_malformed_head_of_the_staging_is_one_message_or_none(bench: Bench, head: bytes) -> None:
    """Whatever stands in `head.json`, the merge starts afresh or is refused in one message."""
    repo_id = f"alice/head-{hashlib.sha256(head).hexdigest()[:8]}"
    bench.hub.add_repo(repo_id, private=True)
    plan_hash = plan_of(bench, repo_id)
    main = bench.hub.repo(repo_id).at("main").id
    bench.hub.repo(repo_id).set_ref(f"refs/heads/resmerge-{plan_hash}", main)
    content = head.replace(b"PLAN", plan_hash.encode())
    bench.hub.push(repo_id, {"resmerge-staging/head.json": content}, branch=f"resmerge-{plan_hash}")

    done = bench.merge("--push-to", repo_id)

    if done.code != 0:
        refused(done, "discard-staging")
        done = bench.merge("--push-to", repo_id, "--discard-staging")
    assert done.code == 0, done.err
    assert bench.published(repo_id) == bench.expected()


def test_a_repository_deleted_meanwhile_is_said_to_be(bench: Bench) -> None:
    """Nobody "took over" a branch whose repository is gone."""
    store = bench.hub._services.store
    bench.hub.faults.add(
        Hook(call=lambda: store.delete(bench.hub.repo("alice/deleted"))),
        path="/commit/resmerge", skip=2, times=1,
    )  # fmt: skip

    done = bench.merge("--push-to", "alice/deleted")

    assert done.code == 3
    assert "gone from the Hub" in done.err
    assert "another run" not in done.err


def test_a_branch_removed_meanwhile_is_said_to_be(bench: Bench) -> None:
    """Nobody "took over" a branch that somebody removed; the same command starts it anew."""

    def remove() -> None:
        branch = staging_branch(bench, "alice/pruned")
        bench.hub.repo("alice/pruned").set_ref(f"refs/heads/{branch}", None)

    bench.hub.faults.add(Hook(call=remove), path="/commit/resmerge", skip=2, times=1)

    stopped = bench.merge("--push-to", "alice/pruned")
    done = bench.merge("--push-to", "alice/pruned")

    assert stopped.code == 3, stopped.err
    assert "somebody removed it" in stopped.err
    assert "took over" not in stopped.err
    assert done.code == 0, done.err
    assert bench.published("alice/pruned") == bench.expected()


@pytest.mark.slow
def test_a_shard_damaged_on_this_disk_is_made_again(bench: Bench, tmp_path: Path) -> None:
    """Killed before a shard is sent; one bit of its file changes; it is merged again, not sent."""
    options = ("--push-to", "alice/bitten", "--work-dir", str(tmp_path))
    process = bench.start(["merge", *bench.sources(), *options, "--json"])
    bench.hub.faults.add(
        Hook(call=lambda: process.send_signal(signal.SIGKILL)), method="PUT", path="/upload/"
    )
    process.communicate(timeout=200)
    bench.hub.faults.clear()
    (row, *_) = [
        json.loads(path.read_text())["shard"]
        for path in tmp_path.rglob("journal/*.safetensors.json")
    ]
    (part,) = tmp_path.rglob(f"{row}.part")
    data = bytearray(part.read_bytes())
    data[-1] ^= 1
    part.write_bytes(data)

    done = bench.merge(*options)

    assert done.code == 0, done.err
    assert bench.published("alice/bitten") == bench.expected()


@pytest.mark.slow
def test_a_hub_that_tells_no_xet_hash_gets_the_shards_again(xet_bench: Bench) -> None:
    """What cannot be taken over from the private repository goes where it will stand."""
    xet_bench.hub.add_repo("alice/no-hash", {".gitattributes": b""})
    xet_bench.hub.settings.tells_xet_hash = False
    try:
        done = xet_bench.merge("--push-to", "alice/no-hash")
    finally:
        xet_bench.hub.settings.tells_xet_hash = True

    assert done.code == 0, done.err
    assert xet_bench.published("alice/no-hash") == xet_bench.expected()
    assert xet_bench.history("alice/no-hash")[0] == "Merge with ResMerge Stream"
    left = [repo.id for repo in xet_bench.hub._services.store.repos("models")]
    assert not [repo_id for repo_id in left if "resmerge" in repo_id]


def test_discarding_starts_afresh_on_both_sides(bench: Bench) -> None:
    """`--discard-staging` forgets what this machine kept: the base's old commit, its shards."""
    bench.hub.faults.add(Answer(status=403, message="no"), path="/commit/main")
    bench.merge("--push-to", "alice/afresh")
    bench.hub.faults.clear()
    old = bench.hub.repo("alice/base").at("main").id
    bench.hub.push("alice/base", {"README.md": b"news"})
    try:
        new = bench.hub.repo("alice/base").at("main").id
        done = bench.merge("--push-to", "alice/afresh", "--discard-staging")
    finally:
        bench.hub.repo("alice/base").set_ref("refs/heads/main", old)

    assert done.code == 0, done.err
    assert done.last["report"]["sources"][0]["revision"] == new


def plan_of(bench: Bench, repo_id: str) -> str:
    """The hash of the group's plan for a target."""
    done = bench.run("plan", *bench.sources(), "--push-to", repo_id, "--json")
    return str(json.loads(done.out)["plan_hash"])


def refused(run: Run, words: str) -> None:
    """Check that a run was refused in one message with some words."""
    assert run.code == 2, run.err
    assert words in run.err
    assert "Traceback" not in run.err
