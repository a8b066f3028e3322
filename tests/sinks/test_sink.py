"""Publishing to the Hub: asked before, staged in private, shown in one commit, safe to repeat."""

import json
import time
from pathlib import Path

import pytest

from loopback_hub import Answer, Delay, Hook
from tests.support.hub_runs import Bench, weight_files

pytestmark = pytest.mark.usefixtures("clean_hub")


def test_main_gets_one_commit_and_the_staging_is_gone(bench: Bench) -> None:
    """A new target is private, holds the bytes of a folder merge, and shows one commit."""
    done = bench.merge("--push-to", "alice/one")

    assert done.code == 0, done.err
    assert bench.published("alice/one") == bench.expected()
    assert bench.history("alice/one") == ["Merge with ResMerge Stream", "initial commit"]
    assert list(bench.hub.repo("alice/one").refs()) == ["refs/heads/main"]
    assert bench.hub.repo("alice/one").settings["private"] is True


def test_the_last_event_has_the_commit(bench: Bench) -> None:
    """The last event names the commit's page."""
    done = bench.merge("--push-to", "alice/event")

    commit = bench.hub.repo("alice/event").at("main").id
    assert done.last["event"] == "finished"
    assert done.last["where"] == f"{bench.hub.endpoint}/alice/event/commit/{commit}"


@pytest.mark.slow
def test_a_slow_upload_is_told_of(bench: Bench) -> None:
    """While everything is merged and shards are still being sent, progress keeps coming."""
    # The first such commit starts the staging; those of shards are slow, the last one's too.
    bench.hub.faults.add(Delay(seconds=3), method="POST", path="/commit/resmerge-", skip=1)
    done = bench.merge("--push-to", "alice/slow")

    assert done.code == 0, done.err
    shards = sum(shard["bytes"] for shard in done.events[0]["plan"]["shards"])
    last_tensor = max(n for n, event in enumerate(done.events) if event["event"] == "shard")
    told = [event for event in done.events[last_tensor:] if event["event"] == "progress"]
    assert told
    for event in told:
        assert event["bytes_written"] <= shards
        assert 0 <= event["bytes_sent"] <= shards
        assert event["seconds_left"] >= 0
    counts = [event["bytes_sent"] for event in done.events if "bytes_sent" in event]
    assert counts == sorted(counts)
    assert counts[-1] > 0


def test_a_listing_says_what_is_staged(bench: Bench) -> None:
    """Before the last commit no shard's row is read again: the branch's listing has the hashes."""
    done = bench.merge("--push-to", "alice/listing")

    read = {e.path.rpartition("/")[2] for e in bench.hub.log.find(path="/resmerge-staging/")}
    assert done.code == 0, done.err
    assert read == {"head.json"}


def test_a_shard_is_sent_while_another_is_committed(bench: Bench) -> None:
    """The line is not idle while the Hub commits: the next shard's bytes are under way."""
    bench.forget_uploads()
    waited = []

    def wait_for_another() -> None:
        until = time.monotonic() + 60
        sent = len(bench.hub.log.find(method="PUT", path="/upload/"))
        while (now := len(bench.hub.log.find(method="PUT", path="/upload/"))) == sent:
            if time.monotonic() > until:
                break
            time.sleep(0.01)
        waited.append(now > sent)

    # The first such commit starts the staging, before anything is sent.
    bench.hub.faults.add(Hook(call=wait_for_another), path="/commit/resmerge-", skip=1, times=1)

    done = bench.merge("--push-to", "alice/overlap")

    assert done.code == 0, done.err
    assert waited == [True]


def test_the_card_recipe_and_report_are_there(bench: Bench) -> None:
    """Card, report, recipe and picture are published with the weights."""
    bench.merge("--push-to", "alice/card")

    report = json.loads(bench.hub.read("alice/card", "resmerge/report.json"))
    recipe = bench.hub.read("alice/card", "resmerge/recipe.yml").decode()
    assert {file["name"] for file in report["files"]} <= set(bench.hub.files("alice/card"))
    assert bench.hub.repo("alice/base").at("main").id in recipe
    assert {"README.md", "resmerge/gates.png"} <= set(bench.hub.files("alice/card"))


def test_public_is_set_after_everything_else(bench: Bench) -> None:
    """`--public` is the last request; until then nobody else sees the repository."""
    done = bench.merge("--push-to", "alice/public", "--public")

    assert done.code == 0, done.err
    changes = [e for e in bench.hub.log if e.method in ("POST", "PUT", "DELETE")]
    assert changes[-1].path.endswith("/settings")
    assert bench.hub.repo("alice/public").settings["private"] is False


def test_a_public_card_names_private_models_only_when_told(bench: Bench) -> None:
    """The plan says that `--public` will name private experts."""
    done = bench.run("plan", *bench.sources(), "--push-to", "alice/named", "--public", "--json")

    assert any("the public card names private" in text for text in done.last["warnings"])


def test_a_finished_merge_is_not_done_again(bench: Bench) -> None:
    """The same command on its own result exits 0, and sends and commits nothing."""
    bench.merge("--push-to", "alice/again")
    bench.hub.log.clear()

    done = bench.merge("--push-to", "alice/again")

    assert (done.code, done.last["already_there"]) == (0, True)
    assert not bench.hub.log.find(path="/commit/|/upload/")
    assert len(bench.history("alice/again")) == 2


def test_a_target_with_something_else_is_refused(bench: Bench) -> None:
    """A repository that holds other files is not touched, and refused before a tensor moves."""
    bench.hub.add_repo("alice/taken", {"model.safetensors": b"x" * 100})
    bench.hub.log.clear()

    done = bench.merge("--push-to", "alice/taken")

    assert done.code == 2
    assert "--update" in done.err
    assert not bench.hub.log.find(method="POST", path="/api/repos|/commit/|/branch/")


def test_refusals_of_an_upload_are_tried_again(bench: Bench) -> None:
    """One 403 of a signed link, one 404 of its check, one page for people: a fresh link each."""
    rules = [
        bench.hub.faults.add("forbidden", method="PUT", path="/upload/", times=1),
        bench.hub.faults.add(Answer(status=404), path="/objects/verify", times=1),
        bench.hub.faults.add("html", path="/preupload/", times=1),
        bench.hub.faults.add("html", method="DELETE", path="/branch/", times=1),
    ]

    done = bench.merge("--push-to", "alice/refused-once")

    assert done.code == 0, done.err
    assert [rule.hits for rule in rules] == [1, 1, 1, 1]
    assert bench.published("alice/refused-once") == bench.expected()
    assert list(bench.hub.repo("alice/refused-once").refs()) == ["refs/heads/main"]


def test_an_empty_repository_may_be_filled(bench: Bench) -> None:
    """A private repository that holds nothing but git's own file is a good target."""
    bench.hub.add_repo("alice/empty", private=True)

    assert bench.merge("--push-to", "alice/empty").code == 0
    assert bench.published("alice/empty") == bench.expected()


def test_an_update_lists_and_removes_stale_weights_and_keeps_the_rest(bench: Bench) -> None:
    """`--update` replaces the model in one commit; other files stay as they are."""
    old = {"model-00007-of-00007.safetensors": b"x" * 64, "notes.md": b"mine", "config.json": b"{}"}
    bench.hub.add_repo("alice/old", old, private=True)
    arguments = ["--push-to", "alice/old", "--update"]

    plan = bench.run("plan", *bench.sources(), *arguments, "--json").last
    done = bench.merge(*arguments)

    assert any("removes" in w and "00007" in w for w in plan["warnings"])
    assert any("replaces" in w and "config.json" in w for w in plan["warnings"])
    assert done.code == 0, done.err
    assert bench.published("alice/old") == {**bench.expected(), "notes.md": b"mine"}
    assert len(bench.history("alice/old")) == 3


def test_an_update_of_a_public_repository_stages_in_private(bench: Bench) -> None:
    """Nobody sees half a model: shards wait in a private repository, removed afterwards."""
    bench.hub.add_repo("alice/shown", {"config.json": b"{}"})
    seen: list[bool] = []
    names = lambda: [r.id for r in bench.hub._services.store.repos("models")]  # noqa: E731
    bench.hub.faults.add(
        Hook(
            call=lambda: seen.append(
                all(bench.hub.repo(n).settings["private"] for n in names() if "-resmerge-" in n)
                and len(bench.hub.repo("alice/shown").refs()) == 1
            )
        ),
        path="/commit/",
    )

    done = bench.merge("--push-to", "alice/shown", "--update")

    assert done.code == 0, done.err
    assert seen
    assert all(seen)
    assert not [name for name in names() if "-resmerge-" in name]
    assert bench.published("alice/shown") == bench.expected()
    assert bench.hub.repo("alice/shown").settings["private"] is False


def test_without_an_account_nothing_starts(bench: Bench) -> None:
    """No token: refused with what to do, before any model is opened."""
    env = bench.env()
    env.pop("HF_TOKEN")
    import subprocess
    import sys

    done = subprocess.run(
        [sys.executable, "-m", "resmerge_stream", "plan", *bench.sources(), "--push-to", "a/b"],
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 2
    assert "Log in" in done.stdout


@pytest.mark.parametrize(
    ("role", "target", "words"),
    [("read", "dora/x", "only read"), ("write", "alice/x", "cannot publish under 'alice'")],
)
def test_a_token_without_the_right_is_refused(
    bench: Bench, role: str, target: str, words: str
) -> None:
    """The right to write in the namespace is checked before a tensor moves."""
    bench.hub.add_user("dora")
    token = bench.hub.add_token("dora", role)  # type: ignore[arg-type]

    plan = bench.fresh(
        ["plan", "--base", "alice/base", "--expert", "alice/expert0", "--push-to", target],
        token=token,
    )

    assert plan.code == 2
    assert words in plan.out


@pytest.mark.slow
def test_a_revoked_token_stops_and_a_new_one_continues(bench: Bench) -> None:
    """Revoked in the middle: exit 3; with another token of the user the shards are kept."""
    first, second = (bench.hub.add_token("alice", "write") for _ in range(2))
    bench.hub.faults.add(
        Hook(call=lambda: bench.hub.revoke_token(first)), path="/commit/resmerge", skip=1, times=1
    )
    arguments = ["merge", *bench.sources(), "--push-to", "alice/revoked", "--json"]

    stopped = bench.fresh(arguments, token=first)
    done = bench.fresh(arguments, token=second)

    assert stopped.code == 3
    assert "Log in again" in stopped.err
    assert done.code == 0, done.err
    assert bench.published("alice/revoked") == bench.expected()


def test_a_full_quota_stops_and_says_so(bench: Bench) -> None:
    """Private storage that is used up: exit 3 with the Hub's words; more storage continues."""
    bench.hub.set_quota("alice", 1)
    stopped = bench.merge("--push-to", "alice/quota")
    bench.hub.set_quota("alice", None)
    done = bench.merge("--push-to", "alice/quota")

    assert stopped.code == 3
    assert "storage limit" in stopped.err
    assert done.code == 0, done.err


def test_two_merges_into_one_target_do_not_mix(bench: Bench) -> None:
    """A target with another merge's unfinished shards is refused; nothing there is removed."""
    bench.hub.faults.add(Answer(status=403, message="no"), path="/commit/main")
    first = bench.merge("--push-to", "alice/two")
    bench.hub.faults.clear()

    other = bench.merge("--push-to", "alice/two", "--method", "task_arithmetic")
    refs = bench.hub.repo("alice/two").refs()
    done = bench.merge("--push-to", "alice/two")

    assert (first.code, other.code, done.code) == (3, 2, 0)
    assert "another merge" in other.err
    assert len(refs) == 2


@pytest.mark.slow
def test_discarding_removes_the_staging_and_nothing_else(bench: Bench) -> None:
    """`--discard-staging` lists and removes the branch; the repository and main stay."""
    bench.hub.faults.add(Answer(status=403, message="no"), path="/commit/main")
    bench.merge("--push-to", "alice/left")
    bench.hub.faults.clear()
    bench.hub.repo("alice/left").set_ref(
        "refs/heads/mine", bench.hub.repo("alice/left").at("main").id
    )

    done = bench.merge(
        "--push-to", "alice/left", "--method", "task_arithmetic", "--discard-staging"
    )

    assert done.code == 0, done.err
    assert "removed branch resmerge-" in done.err
    assert set(bench.hub.repo("alice/left").refs()) == {"refs/heads/main", "refs/heads/mine"}


def test_the_disk_holds_two_shards_at_most(bench: Bench) -> None:
    """Watched while it runs, the work folder never holds more than two shards."""
    sizes: list[int] = []
    work = bench.folder / "watched"
    bench.hub.faults.add(
        Hook(call=lambda: sizes.append(weights_in(work))), path="/upload/|/commit/|/file/"
    )

    done = bench.merge("--push-to", "alice/disk", "--work-dir", str(work))

    largest = max(len(d) for n, d in bench.expected().items() if n.endswith(".safetensors"))
    assert done.code == 0, done.err
    assert 0 < max(sizes) <= 2 * largest
    assert weights_in(work) == 0


def weights_in(folder: Path) -> int:
    """Bytes of weight files below a folder."""
    total = 0
    for path in weight_files(folder):
        try:
            total += path.stat().st_size
        except FileNotFoundError:
            continue
    return total


def test_a_disk_smaller_than_a_shard_is_refused(bench: Bench) -> None:
    """`--max-disk` below the largest shard: refused in the plan, with what to give instead."""
    done = bench.merge("--push-to", "alice/tiny", "--max-disk", "1KB")

    assert done.code == 2
    assert "--max-shard-size" in done.err


def test_streaming_needs_xet(bench: Bench) -> None:
    """`--max-disk 0` where Xet is off: refused in the plan."""
    done = bench.merge("--push-to", "alice/noxet", "--max-disk", "0")

    assert done.code == 2
    assert "Xet" in done.err


def test_a_folder_and_a_repository_at_once(bench: Bench, tmp_path: Path) -> None:
    """`--out` and `--push-to` together give the same bytes in both."""
    out = tmp_path / "out"
    done = bench.merge("--push-to", "alice/both", "--out", str(out))

    assert done.code == 0, done.err
    assert bench.published("alice/both") == bench.expected()
    for name, data in bench.expected().items():
        assert (out / name).read_bytes() == data


def test_verify_reads_a_repository(bench: Bench) -> None:
    """`verify NS/NAME` passes on a merge, and fails once a shard was replaced."""
    bench.merge("--push-to", "alice/verified")
    good = bench.run("verify", "alice/verified", "--json")
    name = next(n for n in bench.expected() if n.endswith(".safetensors"))
    changed = bytearray(bench.expected()[name])
    changed[-1] ^= 1
    bench.hub.push("alice/verified", {name: bytes(changed)})
    bad = bench.run("verify", "alice/verified", "--json")

    assert good.code == 0, good.out
    assert [event["name"] for event in good.events] == [
        "layout", "files", "finite", "recomputed", "statement",
    ]  # fmt: skip
    assert bad.code == 2
    assert any("sha256" in p for event in bad.events for p in event["problems"])
