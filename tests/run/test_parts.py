"""A merge in parts that cannot reach each other: any order, twice, late, killed; the same bytes."""

import contextlib
import errno
import fcntl
import hashlib
import os
import random
import re

import pytest

from loopback_hub import Hook, LoopbackHub
from resmerge_stream import Options, Part
from resmerge_stream.cli.main import main
from resmerge_stream.errors import StoppedError
from resmerge_stream.run.engine import run_merge
from resmerge_stream.run.events import Finished, PartFinished, ShardFinished, TensorMerged
from resmerge_stream.sinks import FolderSink
from resmerge_stream.sinks.journal import PARTS
from resmerge_stream.sinks.layout import plan_shards
from resmerge_stream.sinks.sink import Membership
from resmerge_stream.specs import TensorSpec
from tests.support.checkpoints import file_bytes, make_group, merge, plan_group, recipe_of
from tests.support.hub_runs import make_bench

pytestmark = pytest.mark.usefixtures("without_picture")

SHARD_BYTES = 3000
FINISH = Part(None, 0)


@pytest.fixture(scope="module")
def group(tmp_path_factory):
    """A group whose merge has a dozen files."""
    return make_group(tmp_path_factory.mktemp("parts") / "group", experts=2)


@pytest.fixture(scope="module")
def expected(group, tmp_path_factory):
    """What one process makes of it."""
    out = tmp_path_factory.mktemp("expected") / "out"
    return file_bytes(merge(group, out, options=Options(max_shard_bytes=SHARD_BYTES)).out)


def begun(group, out, part):
    """Plan a part, and return the events of its run, not begun."""
    options = Options(max_shard_bytes=SHARD_BYTES, part=part)
    return run_merge(plan_group(group, out=out, options=options), out=out)


def ran(group, out, part):
    """Run a part to its end, and return its last event."""
    return list(begun(group, out, part))[-1]


def made(events):
    """Return the names of the shards that a run made itself."""
    return [e.shard for e in events if isinstance(e, ShardFinished) and not e.resumed]


def until_first_shard(events):
    """Go on until a shard was made, and return its name."""
    return next(e.shard for e in events if isinstance(e, ShardFinished) and not e.resumed)


def test_every_shard_is_one_part_s_and_the_last_part_publishes(group, expected, tmp_path):
    """Four parts one after another: three end with what is missing, the fourth with the model."""
    out = tmp_path / "out"

    ends = [ran(group, out, Part(number, 4)) for number in range(4)]

    shards = [name for end in ends[:3] for name in end.shards]
    assert len(shards) == len(set(shards))
    assert isinstance(ends[3], Finished)
    assert set(ends[2].missing) == set(expected) - set(shards) - {
        "config.json", "model.safetensors.index.json",
    }  # fmt: skip
    assert file_bytes(out) == expected
    assert not [name for name in os.listdir(out) if name.startswith(".")]


@pytest.mark.parametrize("seed", range(2))
def test_any_order_and_any_repetition_give_the_same_bytes(seed, group, expected, tmp_path):
    """Parts in a drawn order, some again, some stopped in the middle, finishes in between."""
    draw, out = random.Random(seed), tmp_path / "out"
    runs = [Part(number, 4) for number in range(4)] * 2 + [FINISH] * 2
    draw.shuffle(runs)

    for part in runs:
        if part.number is not None and draw.random() < 0.4:
            events = begun(group, out, part)
            for _ in range(draw.randrange(1, 30)):
                next(events, None)
            events.close()
            continue
        with contextlib.suppress(StoppedError) if part == FINISH else contextlib.nullcontext():
            ran(group, out, part)
    for number in range(4):
        end = ran(group, out, Part(number, 4))

    assert isinstance(end, Finished)
    assert file_bytes(out) == expected


@pytest.fixture(params=["locks", "no locks"])
def file_system(request, monkeypatch):
    """One that keeps locks, and one that does not, as mounted buckets and some of clusters."""

    def refused(file, kind):
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

    if request.param == "no locks":
        monkeypatch.setattr(fcntl, "flock", refused)


@pytest.mark.usefixtures("file_system")
def test_a_part_that_runs_twice_at_once_is_no_matter(group, expected, tmp_path):
    """Twins write the same shards at once; whoever is first keeps its file."""
    out = tmp_path / "out"
    twins = [begun(group, out, Part(0, 2)) for _ in range(2)]
    for twin in twins:  # both are within the same shard
        assert next(event for event in twin if isinstance(event, TensorMerged))

    ends = [list(twin) for twin in twins]

    assert made(ends[0])[0] == made(ends[1])[0]
    assert all(isinstance(end[-1], PartFinished) for end in ends)
    assert isinstance(ran(group, out, Part(1, 2)), Finished)

    assert file_bytes(out) == expected


@pytest.mark.usefixtures("file_system")
def test_a_twin_that_is_late_finds_the_merge_done(group, expected, tmp_path):
    """It was in the middle of a shard when the others published: nothing of it is left there."""
    out = tmp_path / "out"
    late = begun(group, out, Part(0, 2))
    until_first_shard(late)
    assert isinstance(ran(group, out, Part(0, 2)), PartFinished)
    assert isinstance(ran(group, out, Part(1, 2)), Finished)

    end = list(late)[-1]

    assert end.already_there
    assert file_bytes(out) == expected
    assert not [name for name in os.listdir(out) if name.startswith(".") or name.endswith(".part")]


def test_a_part_tells_what_is_missing(group, tmp_path, capsys):
    """On a terminal, with exit code 0: a scheduler takes it for done."""
    recipe, out = tmp_path / "recipe.yml", tmp_path / "out"
    recipe.write_text(recipe_of(group).to_yaml())
    words = [str(recipe), "--max-shard-size", str(SHARD_BYTES), "--out", str(out)]

    assert main(["merge", *words, "--part", "0/2"]) == 0
    told = capsys.readouterr().out
    assert main(["merge", *words, "--finish"]) == 3
    refused = capsys.readouterr().err
    assert main(["merge", *words, "--part", "1/2"]) == 0

    options = Options(max_shard_bytes=SHARD_BYTES, part=Part(0, 2))
    plan = plan_group(group, out=tmp_path / "other", options=options)
    own = set(plan.own or ())
    others = sorted({shard.name for shard in plan.shards} - own)
    assert 0 < len(own) < len(plan.shards) == 8
    assert f"part 0 of 2 done: {len(own)} file(s); missing: " in told
    assert re.findall(r"'(model-\S+)'", told) == others
    assert told.endswith("the last part publishes, or --finish\n")
    assert f"of 8 shards {len(others)} are missing" in refused
    assert f"merged into {out}" in capsys.readouterr().out


def test_a_part_after_the_end_does_nothing(group, expected, tmp_path):
    """A task that the scheduler runs once more reads what is there, and ends well."""
    out = tmp_path / "out"
    for number in (1, 0):
        ran(group, out, Part(number, 2))

    events = list(begun(group, out, Part(1, 2)))

    assert events[-1].already_there
    assert not made(events)
    assert file_bytes(out) == expected


def test_a_part_continues_where_it_was_stopped(group, tmp_path):
    """What it made before is not made again."""
    out = tmp_path / "out"
    first = begun(group, out, Part(0, 2))
    name = until_first_shard(first)
    first.close()

    assert name not in made(begun(group, out, Part(0, 2)))


def test_finish_says_what_is_missing_and_publishes_when_nothing_is(group, expected, tmp_path):
    """Exit 3 with the names, and nothing is lost by asking early."""
    out = tmp_path / "out"
    ran(group, out, Part(0, 2))
    with pytest.raises(StoppedError, match=r"are missing, 'model-000") as stopped:
        ran(group, out, FINISH)
    assert "without --finish" in str(stopped.value)
    assert isinstance(ran(group, out, Part(1, 2)), Finished)
    assert ran(group, out, FINISH).already_there
    assert file_bytes(out) == expected


def test_one_run_of_everything_goes_on_from_the_parts(group, expected, tmp_path):
    """The same command without a part merges only what is missing."""
    out = tmp_path / "out"
    end = ran(group, out, Part(0, 2))

    events = list(begun(group, out, None))

    assert not set(made(events)) & set(end.shards)
    assert file_bytes(out) == expected
    assert not [name for name in os.listdir(out) if name.startswith(".")]


def test_a_part_beside_a_run_of_everything_is_refused(group, tmp_path):
    """Whichever of them was there first."""
    out = tmp_path / "out"
    whole = begun(group, out, None)
    until_first_shard(whole)
    with pytest.raises(StoppedError, match="another process is merging"):
        ran(group, out, Part(0, 2))
    whole.close()

    part = begun(group, out, Part(0, 2))
    until_first_shard(part)
    with pytest.raises(StoppedError, match="another process is merging"):
        ran(group, out, None)
    part.close()


def test_a_shard_that_another_part_left_damaged_is_made_again(group, expected, tmp_path):
    """Who publishes reads what others made before it is believed."""
    out = tmp_path / "out"
    end = ran(group, out, Part(0, 2))
    path = out / f"{end.shards[0]}.part"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)

    assert isinstance(ran(group, out, Part(1, 2)), Finished)
    assert file_bytes(out) == expected


def test_of_twins_the_first_keeps_its_shard_and_may_make_it_again(tmp_path):
    """Their bytes may differ, as those of a GPU and a CPU do: file and row stay one run's."""
    (shard,) = plan_shards([[TensorSpec("a", "U8", (8,))]], 1000)
    member = Membership("parts", own=[shard.name])
    out = tmp_path / "out"
    first, second = (FolderSink(out, "p", out / PARTS, {}, member).open() for _ in range(2))

    def kept(sink, data):
        writer = sink.open_shard(shard)
        writer.write(memoryview(data))
        sink.keep(shard, {"size": shard.nbytes, "sha256": writer.finish(), "tensors": []})
        (row,) = sink.by_now().values()
        path = out / f"{shard.name}.part"
        assert hashlib.sha256(path.read_bytes()).hexdigest() == row["sha256"]
        return path.read_bytes()[-8:]

    assert kept(first, b"11111111") == b"11111111"
    assert kept(second, b"22222222") == b"11111111"
    assert kept(first, b"33333333") == b"33333333"  # what it was made of came damaged
    first.close()
    second.close()


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    """A Hub with a group of models, shared by the tests of this file."""
    folder = tmp_path_factory.mktemp("hub")
    with LoopbackHub(folder / "hub") as hub:
        bench = make_bench(folder, hub, max_shard_bytes=50_000)
        bench.expected()
        yield bench
        bench.close()


def part_words(bench, target, part):
    """Return the words of one part of a merge from the Hub to the Hub."""
    words = ["--finish"] if part == "finish" else ["--part", part]
    return ["merge", *bench.sources(), "--push-to", target, *words, "--json"]


@pytest.mark.slow
@pytest.mark.parametrize("is_public", [False, True])
def test_parts_publish_hub_to_hub(is_public, bench, monkeypatch):
    """In any order, one again on a machine that knows nothing, and a finish too early."""
    target = f"alice/parts-{is_public}".lower()
    if is_public:
        bench.hub.add_repo(target, private=False)
    bench.forget_uploads()
    ended = [bench.run(*part_words(bench, target, part)) for part in ("2/4", "0/4", "finish")]
    monkeypatch.setenv("JOB_COMPLETION_INDEX", "0")  # as Kubernetes says it
    ended.append(bench.fresh(part_words(bench, target, "auto/4"), home="another"))
    ended += [bench.run(*part_words(bench, target, part)) for part in ("3/4", "1/4", "2/4")]

    assert [run.code for run in ended] == [0, 0, 3, 0, 0, 0, 0], [run.err for run in ended]
    assert [run.last["event"] for run in ended] == [
        "part", "part", "stopped", "part", "part", "finished", "finished",
    ]  # fmt: skip
    assert not made_of(ended[3])
    assert ended[-1].last["already_there"]
    assert bench.published(target) == bench.expected()
    assert list(bench.hub.repo(target).refs()) == ["refs/heads/main"]


def made_of(run):
    """Return the names of the shards that a command made itself."""
    return [e["shard"] for e in run.events if e["event"] == "shard" and not e["resumed"]]


@pytest.mark.slow
def test_all_parts_at_once_and_one_twice(bench):
    """Five processes on one machine, one of which is killed and runs again: one commit on main."""
    bench.forget_uploads()
    words = [part_words(bench, "alice/at-once", f"{n}/4") for n in (0, 1, 2, 3, 1)]
    killed = []

    def kill():
        if not killed:
            killed.append(processes[0].pid)
            processes[0].kill()

    processes = []
    # The first such commit begins the staging.
    bench.hub.faults.add(
        Hook(call=kill), method="POST", path="/commit/resmerge", skip=1, times=1, after=True
    )
    processes += [bench.start(one) for one in words]
    ends = [process.communicate(timeout=300) for process in processes]
    bench.hub.faults.clear()
    assert killed
    codes = [process.returncode for process in processes]
    assert codes[1:] == [0] * 4, ends
    again = bench.fresh(words[0])

    assert again.code == 0, again.err
    assert bench.published("alice/at-once") == bench.expected()
    assert bench.history("alice/at-once") == ["Merge with ResMerge Stream", "initial commit"]
    assert list(bench.hub.repo("alice/at-once").refs()) == ["refs/heads/main"]


@pytest.mark.slow
def test_processes_fill_one_folder_in_parts(bench, tmp_path):
    """Four at once, one of them twice, one killed in the middle and run again: the same bytes."""
    out = tmp_path / "out"
    words = [
        ["merge", *bench.folders(), "--out", str(out), "--part", f"{n}/4", "--json"]
        for n in (0, 1, 2, 3, 1)
    ]
    first = bench.start(words[0])
    for line in first.stdout:
        if '"event": "tensor"' in line:
            first.kill()
            break
    first.communicate()
    ends = [bench.start(one) for one in words[1:]]
    told = [process.communicate(timeout=300) for process in ends]
    assert [process.returncode for process in ends] == [0] * 4, told

    again = bench.fresh(words[0])

    assert again.code == 0, again.err
    assert again.last["event"] == "finished"
    for name, data in bench.expected().items():
        assert (out / name).read_bytes() == data, name


@pytest.mark.slow
def test_a_pull_request_is_opened_by_the_finish(bench):
    """Parts that end together would open two; so all are staged, and one run opens it."""
    bench.hub.add_repo("alice/offered", bench.group / "base", private=False)
    words = ["merge", *bench.sources(), "--push-to", "alice/offered", "--create-pr", "--json"]
    parts = [bench.run(*words, "--part", f"{n}/2") for n in range(2)]
    assert [run.last["event"] for run in parts] == ["part", "part"], [run.err for run in parts]
    assert parts[1].last["missing"] == []

    done = bench.run(*words, "--finish")

    assert done.last["event"] == "finished", done.err
    assert "/discussions/" in done.last["where"]
