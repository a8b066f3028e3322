"""Hub to Hub, whatever happens in between: faults, kills, two at once, another machine."""

import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import save_file

from loopback_hub import FAULTS, Hook
from tests.support.checkpoints import read_tensors
from tests.support.hub_runs import MODELS, Bench, Run, weight_files

pytestmark = pytest.mark.usefixtures("clean_hub")


def check_published(bench: Bench, repo_id: str) -> None:
    """Main has one new commit with the expected bytes, and no staging is left."""
    assert bench.published(repo_id) == bench.expected()
    assert bench.history(repo_id) == ["Merge with ResMerge Stream", "initial commit"]
    assert list(bench.hub.repo(repo_id).refs()) == ["refs/heads/main"]


def finish(bench: Bench, repo_id: str, *arguments: str) -> list[Run]:
    """Merge until it is done; every stop on the way must be one that can be continued."""
    runs: list[Run] = []
    for _ in range(8):
        runs.append(bench.merge("--push-to", repo_id, *arguments))
        if runs[-1].code == 0:
            return runs
        assert _can_be_continued(runs[-1]), runs[-1].err
        assert "Traceback" not in runs[-1].err
    raise AssertionError(runs[-1].err)


def _can_be_continued(run: Run) -> bool:
    """Whether it stopped, or was told before it began that the token is none (`revoked`), or that
    it does not suffice (`forbidden`)."""
    refusals = ("does not accept the token", "you may not write to")
    return run.code == 3 or (run.code == 2 and any(text in run.err for text in refusals))


def start_killed(
    bench: Bench, repo_id: str, method: str, path: str, *options: str, **when: object
) -> None:
    """Start a merge that is killed at a request, and wait for its end."""
    options = options or ("--public",)
    arguments = ["merge", *bench.sources(), "--push-to", repo_id, *options, "--json"]
    process = bench.start(arguments)
    rule = bench.hub.faults.add(
        Hook(call=lambda: process.send_signal(signal.SIGKILL)),
        method=method,
        path=path,
        times=1,
        **when,  # type: ignore[arg-type]
    )
    process.communicate(timeout=120)
    bench.hub.faults.clear()
    assert (rule.hits, process.returncode) == (1, -signal.SIGKILL)


KILLS = {
    "after create": ("POST", "/api/repos/create", {"after": True}),
    "after the branch": ("POST", "/branch/", {"after": True}),
    "after a shard's commit": ("POST", "/commit/resmerge", {"after": True, "skip": 1}),
    "in an upload": ("PUT", "/upload/", {"skip": 1}),
    "before the last commit": ("POST", "/commit/main", {}),
    "after the last commit": ("POST", "/commit/main", {"after": True}),
    "before the staging goes": ("DELETE", "/branch/", {}),
    "before the visibility": ("PUT", "/settings", {}),
    "after the visibility": ("PUT", "/settings", {"after": True}),
}


@pytest.mark.parametrize(
    "moment",
    [
        moment if moment in ("in an upload", "after the last commit")
        else pytest.param(moment, marks=pytest.mark.slow)
        for moment in KILLS
    ],
)  # fmt: skip
def test_a_killed_merge_is_finished_by_the_same_command(bench: Bench, moment: str) -> None:
    """SIGKILL at an exact request: main shows all or nothing, and a rerun makes equal bytes."""
    method, path, when = KILLS[moment]
    repo_id = f"alice/kill-{list(KILLS).index(moment)}"
    start_killed(bench, repo_id, method, path, **when)

    shown = set(bench.hub.files(repo_id)) - {".gitattributes"}
    assert not shown or set(bench.expected()) <= shown
    sent_before = len(bench.hub.log.find(method="PUT", path="/upload/", status=200))
    finish(bench, repo_id, "--public")

    check_published(bench, repo_id)
    assert bench.hub.repo(repo_id).settings["private"] is False
    sent = len(bench.hub.log.find(method="PUT", path="/upload/", status=200))
    shards = sum(name.endswith(".safetensors") for name in bench.expected())
    assert sent <= shards + 1, f"{sent_before} before, {sent} in all"


def test_a_merge_in_fp8_that_was_killed_ends_with_a_folders_bytes(bench: Bench) -> None:
    """Scales and codes of every shard, Hub to Hub, are those that a folder gets."""
    repo_id, dtype = "alice/fp8", ("--dtype", "fp8")
    start_killed(bench, repo_id, "PUT", "/upload/", *dtype, skip=1)
    finish(bench, repo_id, *dtype)
    out = bench.folder / "fp8"
    assert bench.run("merge", *bench.folders(), *dtype, "--out", str(out)).code == 0

    published = bench.published(repo_id)
    for path in (path for path in out.iterdir() if path.name.startswith(("model", "config"))):
        assert published[path.name] == path.read_bytes()
    assert b"weight_scale_inv" in b"".join(published.values())


@pytest.mark.parametrize(
    "moment", ["after create", pytest.param("after the branch", marks=pytest.mark.slow)]
)
def test_a_killed_update_leaves_no_repository_behind(bench: Bench, moment: str) -> None:
    """The private repository beside a public target goes in the end, marked in time or not."""
    method, path, when = KILLS[moment]
    repo_id = f"alice/shown-{len(moment)}"
    bench.hub.add_repo(repo_id, {"config.json": b"{}"})
    names = lambda: [r.id for r in bench.hub._services.store.repos("models")]  # noqa: E731

    start_killed(bench, repo_id, method, path, "--update", **when)
    assert any(name.startswith(f"{repo_id}-resmerge-") for name in names())
    finish(bench, repo_id, "--update")

    assert bench.published(repo_id) == bench.expected()
    assert not any(name.startswith(f"{repo_id}-resmerge-") for name in names())


@pytest.mark.slow
def test_kills_at_random_moments(bench: Bench) -> None:
    """SIGKILL at random moments, again and again on one target, until a run gets through."""
    draw = random.Random(7)
    arguments = ["merge", *bench.sources(), "--push-to", "alice/random", "--json"]
    for _ in range(6):
        process = bench.start(arguments)
        time.sleep(draw.uniform(0.5, 4.0))
        process.send_signal(signal.SIGKILL)
        process.communicate()

    finish(bench, "alice/random")
    check_published(bench, "alice/random")


@pytest.mark.slow
def test_a_fresh_machine_continues_from_the_staging_branch(bench: Bench, tmp_path: Path) -> None:
    """With nothing but the branch, shards done are not read, merged or sent again."""
    start_killed(bench, "alice/moved", "POST", "/commit/resmerge", after=True, skip=2)
    bench.hub.log.clear()

    done = bench.merge("--push-to", "alice/moved", "--public", "--work-dir", str(tmp_path))

    resumed = [event["resumed"] for event in done.events if event["event"] == "shard"]
    assert done.code == 0, done.err
    assert sum(resumed) >= 2
    assert len(bench.hub.log.find(method="PUT", path="/upload/")) <= len(resumed) - 2 + 1
    check_published(bench, "alice/moved")


@pytest.mark.slow
def test_a_main_that_moved_changes_nothing(bench: Bench, tmp_path: Path) -> None:
    """The commits of the first start win over a source's main that moved, on any machine."""
    start_killed(bench, "alice/pinned", "POST", "/commit/resmerge", after=True, skip=1)
    old = bench.hub.repo("alice/expert1").at("main").id
    bench.hub.push("alice/expert1", bench.group / "expert2")
    try:
        done = bench.merge("--push-to", "alice/pinned", "--public", "--work-dir", str(tmp_path))
    finally:
        bench.hub.repo("alice/expert1").set_ref("refs/heads/main", old)

    assert done.code == 0, done.err
    assert done.last["report"]["sources"][2]["revision"] == old
    check_published(bench, "alice/pinned")


@pytest.mark.slow
def test_a_staged_shard_that_is_not_the_journals_is_made_again(bench: Bench) -> None:
    """Every shard on the branch is compared with the journal before it is believed."""
    start_killed(bench, "alice/damaged", "POST", "/commit/resmerge", after=True, skip=1)
    branch = next(r for r in bench.hub.repo("alice/damaged").refs() if "resmerge-" in r)
    staged = bench.hub.files("alice/damaged", branch)
    name = next(n for n in staged if n.endswith(".safetensors"))
    bench.hub.push("alice/damaged", {name: b"x" * 600}, branch=branch.removeprefix("refs/heads/"))

    finish(bench, "alice/damaged", "--public")

    check_published(bench, "alice/damaged")


@pytest.mark.slow
def test_the_second_of_two_runs_takes_over_and_the_first_stops(
    bench: Bench, tmp_path: Path
) -> None:
    """Two runs of one merge at once: one publishes, the other stops and removes nothing."""
    second: list[Run] = []
    arguments = ("--push-to", "alice/both-at-once", "--work-dir", str(tmp_path))
    bench.hub.faults.add(
        Hook(call=lambda: second.append(bench.merge(*arguments))),
        method="POST",
        path="/commit/resmerge",
        skip=1,
        times=1,
    )

    first = bench.fresh(
        ["merge", *bench.sources(), "--push-to", "alice/both-at-once", "--json"], home="other"
    )

    assert first.code == 3, first.err
    assert "another run" in first.err
    assert second[0].code == 0, second[0].err
    check_published(bench, "alice/both-at-once")


def test_somebody_elses_commit_on_main_is_not_overwritten(bench: Bench) -> None:
    """When main moves during the merge the run stops, says so, and leaves both sides alone."""
    bench.hub.faults.add(
        Hook(call=lambda: bench.hub.push("alice/moving", {"notes.md": b"mine"})),
        method="POST",
        path="/commit/resmerge",
        skip=1,
        times=1,
    )

    done = bench.merge("--push-to", "alice/moving")

    assert done.code == 2
    assert "was changed while this merge ran" in done.err
    assert set(bench.hub.files("alice/moving")) == {".gitattributes", "notes.md"}
    assert len(bench.hub.repo("alice/moving").refs()) == 2


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_alone(bench: Bench, fault: str) -> None:
    """Each fault, twice in a row at every kind of request: done, or stopped and continued."""
    for number, (method, path) in enumerate(
        [("GET", "/file/"), ("GET", "/api/"), ("POST", "/commit/"), ("POST", "/batch"),
         ("PUT", "/upload/"), ("POST", "/commit/main"), ("DELETE", "/branch/")]
    ):  # fmt: skip
        bench.hub.faults.add(fault, method=method, path=path, times=2, skip=number % 2)
        finish(bench, f"alice/fault-{fault}-{number}")
        bench.hub.faults.clear()
        check_published(bench, f"alice/fault-{fault}-{number}")


@pytest.mark.slow
def test_every_fault_at_random(bench: Bench) -> None:
    """5 % of all requests fail in one way or another: equal bytes, after continuing if need be."""
    bench.hub.faults.seed(3)
    for fault in FAULTS:
        bench.hub.faults.add(fault, chance=0.05 / len(FAULTS))
    for number in range(5):
        for _ in range(3):
            done = bench.merge("--push-to", f"alice/chance-{number}")
            if done.code == 0:
                break
            assert _can_be_continued(done), done.err
        finish(bench, f"alice/chance-{number}")
        check_published(bench, f"alice/chance-{number}")


@pytest.mark.slow
def test_the_token_and_signed_links_are_written_nowhere(bench: Bench) -> None:
    """Neither a token nor a signature of a link is printed, kept in a file, or published; and the
    storage that links lead to is shown no token."""
    bench.hub.log.clear()
    bench.hub.faults.add("503", chance=0.1, path="/file/|/upload/")
    home = bench.folder / "planted"
    process = bench.start(
        ["merge", *bench.sources(), "--push-to", "alice/planted", "--json"], home="planted"
    )
    arguments = Path(f"/proc/{process.pid}/cmdline").read_bytes()
    out, err = process.communicate(timeout=200)

    assert process.returncode == 0, err
    secret = bench.token.encode()
    places = {"arguments": arguments, "stdout": out.encode(), "stderr": err.encode()}
    for path in home.rglob("*"):
        if path.is_file():
            places[str(path)] = path.read_bytes()
    for name in bench.hub.files("alice/planted"):
        places[name] = bench.hub.read("alice/planted", name)
    assert not [place for place, data in places.items() if secret in data]
    assert not [place for place, data in places.items() if b"signature=" in data]
    stored = bench.hub.log.find(port="cdn")
    assert stored
    assert not [entry.path for entry in stored if entry.user is not None]


def test_xet_gives_the_same(xet_bench: Bench) -> None:
    """Through Xet storage instead of LFS: the same bytes, and one commit."""
    assert xet_bench.merge("--push-to", "alice/xet").code == 0

    check_published(xet_bench, "alice/xet")


def test_streaming_leaves_no_weight_file(xet_bench: Bench) -> None:
    """`--max-disk 0`: shards go into the upload as they are merged, and no file holds them."""
    seen: list[Path] = []
    work = xet_bench.folder / "streamed"
    xet_bench.hub.faults.add(
        Hook(call=lambda: seen.extend(weight_files(work))), path="/commit/|/file/"
    )

    done = xet_bench.merge(
        "--push-to", "alice/streamed", "--max-disk", "0", "--work-dir", str(work)
    )

    assert done.code == 0, done.err
    assert not seen
    check_published(xet_bench, "alice/streamed")


def test_models_that_are_equal_in_other_files_make_no_repository(bench: Bench) -> None:
    """The base's values as float32 in one file: seen before anything is made on the Hub."""
    twin = bench.folder / "twin"
    shutil.copytree(bench.group / "base", twin)
    tensors = {name: tensor.float() for name, tensor in read_tensors(twin).items()}
    for file in twin.glob("model*"):
        file.unlink()
    save_file(tensors, twin / "model.safetensors")
    bench.hub.add_repo("alice/twin", twin)
    models = ("--base", "alice/base", "--expert", "alice/twin")
    assert bench.run("plan", *models, "--push-to", "alice/again").code == 0

    done = bench.run("merge", *models, "--push-to", "alice/again", "--json")

    assert done.code == 2, done.err
    assert done.last["notices"][0]["kind"] == "nothing-differs"
    assert not bench.hub.log.find(method="POST", path="/create|/commit|/branch|/lfs")


def test_one_small_read_of_each_model_tells_that_they_differ(bench: Bench) -> None:
    """Before the repository is made, a merge reads what a plan reads and a few rows more."""
    assert bench.run("plan", *bench.sources(), "--push-to", "alice/looked").code == 0
    planning = len(bench.hub.log.find(method="GET", path=r"\.safetensors"))
    bench.hub.log.clear()

    assert bench.merge("--push-to", "alice/looked").code == 0

    made = bench.hub.log.find(method="POST", path="/repos/create")[0].time
    reads = bench.hub.log.find(method="GET", path=r"\.safetensors")
    assert sum(read.time < made for read in reads) <= planning + 2 * len(MODELS)


@pytest.mark.slow
def test_transformers_loads_what_was_published(bench: Bench) -> None:
    """`from_pretrained` of the repository gives a model that generates."""
    bench.merge("--push-to", "alice/loaded")
    code = (
        "import sys, torch; from transformers import AutoModelForCausalLM;"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1]);"
        "out = model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=2, do_sample=False);"
        "assert out.shape[1] >= 4"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "alice/loaded"],
        env=bench.env(),
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 0, done.stderr[-2000:]


def test_a_result_of_an_expert_that_moved_is_not_taken_for_todays(
    bench: Bench, tmp_path: Path
) -> None:
    """On a fresh machine too: the same command names both commits, `--update` makes it anew."""
    repo_id, moving = "alice/stale", "alice/expert-moving"
    old = {path.name: path.read_bytes() for path in (bench.group / "expert0").iterdir()}
    new = {path.name: path.read_bytes() for path in (bench.group / "expert2").iterdir()}
    bench.hub.add_repo(moving, old)
    words = ["--base", "alice/base", "--expert", moving, "--expert", "alice/expert1", "--json"]
    words += ["--push-to", repo_id, "--work-dir"]
    assert bench.run("merge", *words, str(tmp_path / "a")).code == 0
    before = bench.published(repo_id)
    first = bench.hub.repo(moving).refs()["refs/heads/main"]
    bench.hub.push(moving, new)
    now = bench.hub.repo(moving).refs()["refs/heads/main"]

    refused = bench.run("merge", *words, str(tmp_path / "b"))

    assert (refused.code, bench.published(repo_id)) == (2, before)
    assert f"{moving}@{first[:12]}, which is at {now[:12]} now" in refused.err
    assert bench.run("merge", *words, str(tmp_path / "c"), "--update").code == 0
    assert bench.published(repo_id) != before
    again = bench.run("merge", *words, str(tmp_path / "d"))
    assert (again.code, again.last["already_there"]) == (0, True)
