"""Models in buckets of the Hub: known by their files' hashes, and refused once these are others."""

import json
import re
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from loopback_hub import Hook, LoopbackHub
from resmerge_stream.errors import UnsupportedCheckpointError
from resmerge_stream.recipe import ModelRef
from tests.sources.test_ggml import Type, as_folder, write
from tests.sources.test_ggml import values as values_of_gguf
from tests.support.checkpoints import file_bytes, make_group, read_tensors
from tests.support.hub_runs import Bench, Run
from tests.support.trainers import saved_by_deepspeed

STEPS = (5, 10, 100)
RUN = "hf://buckets/alice/run"
WEIGHTS = "checkpoint-100/model-00002-of-00002.safetensors"


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    """A Hub with a base, a folder of a run's checkpoints, and nothing in its buckets."""
    folder = tmp_path_factory.mktemp("buckets")
    group = make_group(folder / "group", experts=len(STEPS), sharded=True)
    for step, expert in zip(STEPS, group.experts, strict=True):
        shutil.copytree(expert, folder / f"run/checkpoint-{step}")
    shutil.copytree(group.experts[0], folder / "run/checkpoint-best")
    with LoopbackHub(folder / "hub") as hub:
        made = Bench(hub, folder, hub.add_user("alice"))
        hub.add_repo("alice/base", group.base)
        hub.add_repo("alice/run", kind="buckets", private=True)
        try:
            yield made
        finally:
            made.close()


@pytest.fixture(autouse=True)
def calm(bench: Bench) -> Iterator[None]:
    """The Hub behaves, has heard nothing yet, and has the run in a bucket."""
    bench.hub.push("alice/run", bench.folder / "run", kind="buckets")
    bench.hub.log.clear()
    yield
    bench.hub.faults.clear()


def replaced(bench: Bench, path: str = WEIGHTS) -> None:
    """Put the weights of another checkpoint, of the same size, in a file's place."""
    other = bench.folder / "run" / path.replace("checkpoint-100", "checkpoint-10")
    bench.hub.push("alice/run", {path: other}, kind="buckets")


def average(bench: Bench, out: Path, place: str = RUN) -> Run:
    """Average a run's checkpoints in shards of a few tensors."""
    words = ["average", f"{place}/checkpoint-*", "--max-shard-size", "8KB", "--json"]
    return bench.run(*words, "--out", str(out))


def averaged(bench: Bench, out: Path, place: str = RUN) -> dict[str, bytes]:
    """The same, and return weights, index and config."""
    done = average(bench, out, place)
    assert done.code == 0, done.err
    return file_bytes(out)


def merged(bench: Bench, out: Path, base: object, expert: object) -> dict[str, bytes]:
    """Merge one expert into a folder and return weights and config."""
    words = ["--base", str(base), "--expert", str(expert), "--method", "task_arithmetic"]
    done = bench.run("merge", *words, "--out", str(out))
    assert done.code == 0, done.err
    return file_bytes(out)


def test_an_average_of_a_buckets_checkpoints_has_the_bytes_of_the_folders(
    bench: Bench, tmp_path: Path
) -> None:
    """A pattern is the folders that fit, by step; what has no step is left out, as from folders."""
    there = averaged(bench, tmp_path / "there")

    assert there == averaged(bench, tmp_path / "here", str(bench.folder / "run"))
    report = json.loads((tmp_path / "there/resmerge/report.json").read_text())
    named = [source["id"] for source in report["sources"]]
    assert named == [f"checkpoint-{step}" for step in STEPS]
    assert bench.run("verify", str(tmp_path / "there")).code == 0


def test_a_plan_of_a_bucket_reads_only_headers(bench: Bench) -> None:
    """A weight file's first bytes, and the small files."""
    done = bench.run("plan", "--base", "alice/base", "--expert", f"{RUN}/checkpoint-5")

    assert done.code == 0, done.err
    files = bench.hub.repo("alice/run", "buckets").at("main").files
    objects = [e.sha256 for path, e in files.items() if path.endswith(".safetensors")]
    reads = bench.hub.log.find(path=f"/file/({'|'.join(objects)})", method="GET")
    assert reads
    assert all((entry.range or "").startswith("bytes=0-") for entry in reads)


def test_a_model_in_a_bucket_is_a_base_or_an_expert(bench: Bench, tmp_path: Path) -> None:
    """At the top or in a folder; its tokenizer and config go along."""
    bench.hub.add_repo("alice/top", bench.group / "expert1", kind="buckets")
    run = bench.folder / "run"

    there = merged(bench, tmp_path / "a", "hf://buckets/alice/top", f"{RUN}/checkpoint-5/")
    here = merged(bench, tmp_path / "b", bench.group / "expert1", run / "checkpoint-5")

    assert there == here
    for name in ("tokenizer.json", "generation_config.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_what_a_trainer_left_in_a_bucket_is_read(bench: Bench, tmp_path: Path) -> None:
    """A folder of DeepSpeed's, with the config one folder up; and a GGUF file by its path."""
    left = tmp_path / "run"
    saved_by_deepspeed(read_tensors(bench.group / "expert0"), left / "step-9/zero3", "universal")
    shutil.copy(bench.group / "expert0/config.json", left / "step-9")
    gguf = write(left / "gguf/model.gguf", "qwen2", Type.Q8_0)
    bench.hub.add_repo("alice/left", left, kind="buckets")
    changed = {name: tensor + 0.01 for name, tensor in values_of_gguf(gguf).items()}
    base = as_folder(changed, tmp_path / "base")

    places = [(bench.group / "base", "step-9/zero3"), (base, "gguf/model.gguf"), (base, "gguf")]
    for number, (own, place) in enumerate(places):
        there = merged(bench, tmp_path / f"t{number}", own, f"hf://buckets/alice/left/{place}")
        assert there == merged(bench, tmp_path / f"h{number}", own, left / place)


@pytest.mark.parametrize("moment", ["while it is read", "after it was read"])
def test_a_file_that_is_replaced_ends_the_merge(bench: Bench, tmp_path: Path, moment: str) -> None:
    """Of the same size too: its hash tells. Nothing that was made of it is kept."""

    def change() -> None:
        replaced(bench)
        bench.hub.expire_urls()  # a new link leads to the new content

    if moment == "while it is read":  # behind the headers
        bench.hub.faults.add(Hook(call=change), path="/file/", skip=8, times=1)
    else:
        path = "/api/buckets/alice/run/paths-info"
        bench.hub.faults.add(Hook(call=change), method="POST", path=path, times=1)

    done = average(bench, tmp_path / "out")

    assert done.code == 2, done.err
    assert re.search(rf"{RUN}/{WEIGHTS} was replaced", done.err)
    assert not (tmp_path / "out").exists()


def test_a_small_file_that_is_replaced_ends_the_merge(bench: Bench, tmp_path: Path) -> None:
    """The tokenizer that is copied is that of the weights."""
    name = "checkpoint-100/tokenizer_config.json"
    bench.hub.faults.add(
        Hook(call=lambda: bench.hub.push("alice/run", {name: b"{}"}, kind="buckets")),
        method="POST",
        path="/api/buckets/alice/run/paths-info",
        times=1,
    )

    done = average(bench, tmp_path / "out")

    assert done.code == 2, done.err
    assert f"{name} was replaced" in done.err


def test_what_a_run_that_goes_on_writes_may_change(bench: Bench, tmp_path: Path) -> None:
    """Its state and its logs are not the model's."""
    names = ("checkpoint-100/trainer_state.json", "checkpoint-100/logs/events", "run.log")
    bench.hub.push("alice/run", dict.fromkeys(names, b"1"), kind="buckets")
    rule = bench.hub.faults.add(
        Hook(call=lambda: bench.hub.push("alice/run", dict.fromkeys(names, b"2"), kind="buckets")),
        method="POST",
        path="/api/buckets/alice/run/paths-info",
        times=1,
    )

    done = average(bench, tmp_path / "out")

    assert done.code == 0, done.err
    assert rule.hits == 1


def test_a_file_that_is_gone_is_named(bench: Bench, tmp_path: Path) -> None:
    """Put back, the same command goes on."""
    bench.hub.faults.add(
        Hook(call=lambda: bench.hub.remove("alice/run", WEIGHTS, kind="buckets")),
        method="POST",
        path="/api/buckets/alice/run/paths-info",
        times=1,
    )

    done = average(bench, tmp_path / "out")

    assert done.code == 2, done.err
    assert f"{RUN}/{WEIGHTS} is gone" in done.err
    bench.hub.push("alice/run", bench.folder / "run", kind="buckets")
    there = averaged(bench, tmp_path / "out")
    assert there == averaged(bench, tmp_path / "here", str(bench.folder / "run"))


def killed(bench: Bench, out: Path) -> None:
    """Start an average that is killed after a shard, again where it ended before that."""
    words = ["average", f"{RUN}/checkpoint-*", "--max-shard-size", "8KB", "--json"]
    for _ in range(20):
        shutil.rmtree(out, ignore_errors=True)
        process = bench.start([*words, "--out", str(out)])
        for line in process.stdout or ():
            if json.loads(line)["event"] == "shard":
                process.send_signal(signal.SIGKILL)
                break
        process.communicate(timeout=120)
        if process.returncode == -signal.SIGKILL and not (out / "config.json").exists():
            return
    raise AssertionError("every average ended before it was killed")


def test_a_killed_average_continues(bench: Bench, tmp_path: Path) -> None:
    """The same command ends with the same bytes, and does not make finished shards again."""
    killed(bench, tmp_path / "out")

    done = average(bench, tmp_path / "out")

    assert done.code == 0, done.err
    assert any(event.get("resumed") for event in done.events)
    expected = averaged(bench, tmp_path / "here", str(bench.folder / "run"))
    assert file_bytes(tmp_path / "out") == expected


def test_a_killed_average_of_files_that_changed_since_is_refused(
    bench: Bench, tmp_path: Path
) -> None:
    """What was finished is of other sources: it is neither used nor thrown away."""
    killed(bench, tmp_path / "out")
    replaced(bench)

    done = average(bench, tmp_path / "out")

    assert done.code == 2, done.err
    assert "changed" in done.err


def test_a_finished_average_of_files_that_changed_since_is_not_todays(
    bench: Bench, tmp_path: Path
) -> None:
    """The same command says whose result is there."""
    before = averaged(bench, tmp_path / "out")
    again = average(bench, tmp_path / "out")
    replaced(bench)

    refused = average(bench, tmp_path / "out")

    assert (again.code, again.last["already_there"]) == (0, True)
    assert refused.code == 2
    assert file_bytes(tmp_path / "out") == before


@pytest.mark.parametrize(
    "fault",
    ["503", "cut", *(pytest.param(one, marks=pytest.mark.slow) for one in ("expired", "reset"))],
)
def test_a_fault_that_passes_is_survived(bench: Bench, tmp_path: Path, fault: str) -> None:
    """At the storage, and where the bucket is listed and its links are given out."""
    expected = averaged(bench, tmp_path / "here", str(bench.folder / "run"))
    for number, path in enumerate(["/file/", "/buckets/"]):
        if path == "/buckets/" and fault == "expired":
            continue  # the Hub's own refusal
        rule = bench.hub.faults.add(fault, path=path, times=2, skip=3)
        assert averaged(bench, tmp_path / f"{number}", RUN) == expected
        assert rule.hits == 2
        bench.hub.faults.clear()


def test_what_is_published_does_not_say_where_the_bucket_is(bench: Bench) -> None:
    """Card and recipe name the folder's last part; the base that is public is named."""
    words = ["--base", "alice/base", "--expert", f"{RUN}/checkpoint-5"]
    done = bench.run("merge", *words, "--push-to", "alice/merged", "--public", "--json")

    assert done.code == 0, done.err
    texts = {name: bench.hub.read("alice/merged", name) for name in bench.hub.files("alice/merged")}
    assert b"checkpoint-5 (in a bucket)" in texts["README.md"]
    assert b"base_model:\n- alice/base\n" in texts["README.md"]
    assert not [name for name, data in texts.items() if b"buckets/alice" in data]


@pytest.mark.parametrize(
    ("place", "words"),
    [
        ("hf://buckets/alice/nothing/x", "there is no such bucket"),
        ("hf://buckets/carol/secret/x", "there is no such bucket"),
        ("hf://buckets/alice/nothing/x-*", "there is no such bucket"),
        (f"{RUN}/step_*", "no checkpoint fits"),
        (f"{RUN}/checkpoint-7", "has no config.json"),
        (RUN, f"such as '?{RUN}/checkpoint-100|such as {RUN}/checkpoint-best"),
        ("hf://buckets/alice", "hf://buckets/namespace/name"),
    ],
)
def test_what_is_not_there_is_said(bench: Bench, place: str, words: str) -> None:
    """Another's private bucket is none; one of several models is the user's choice."""
    bench.hub.add_user("carol")
    if not bench.hub.has_repo("carol/secret", "buckets"):
        bench.hub.add_repo("carol/secret", {"x/config.json": b"{}"}, kind="buckets", private=True)

    done = bench.run("plan", "--base", "alice/base", "--expert", place)

    assert done.code == 2, done.out
    assert re.search(words, done.out)


def test_a_model_in_a_bucket_is_asked_only_when_it_is_copied() -> None:
    """Transformers loads folders and repositories: the command that copies it is named."""
    from resmerge_stream.evaluation.asking import open_model

    with pytest.raises(UnsupportedCheckpointError, match=f"hf buckets sync {RUN}/checkpoint-5 "):
        open_model(f"{RUN}/checkpoint-5", "cpu")


def test_names_with_an_at_are_read_as_they_are() -> None:
    """A bucket has no revisions."""
    ref = ModelRef.parse("hf://buckets/alice/run/a@b")

    assert (ref.in_bucket, ref.revision) == (("alice/run", "a@b"), None)
    assert str(ref) == "hf://buckets/alice/run/a@b"
