"""Whole merges: the same bytes however they were made, and every way to be interrupted."""

import json
import os
import random
import threading

import pytest
import torch

from resmerge_stream import StoppedError, run_merge
from resmerge_stream.errors import NonFiniteError, OutputExistsError, PlanRefusedError
from resmerge_stream.planning.plan import Options
from resmerge_stream.report.rows import TENSOR_KEYS
from tests.support.checkpoints import (
    edit_tensors,
    file_bytes,
    make_group,
    merge,
    plan_group,
    read_tensors,
    run_python,
)

pytestmark = pytest.mark.usefixtures("without_picture")

SMALL = Options(max_shard_bytes=3000)
UP = "model.layers.1.mlp.up_proj.weight"


def start(group, out, *, options=SMALL, **recipe):
    """Plan a merge and return its events, with the journal beside the output."""
    plan = plan_group(group, out=out, options=options, **recipe)
    return run_merge(plan, out=out, work_dir=out.parent / "work")


def until_shard(events, count=1):
    """Take events up to and with a number of finished shards; return those shards' names."""
    done = []
    for event in events:
        if event.name == "shard":
            done.append(event.shard)
            if len(done) == count:
                return done
    raise AssertionError("the merge ended before that many shards")


def test_events_come_in_order_and_end_with_the_report(tmp_path):
    """Planned, tensors and shards in file order, published, finished."""
    group = make_group(tmp_path / "group", sharded=True)

    merged = merge(group, tmp_path / "out")

    kinds = [event.name for event in merged.events]
    assert kinds[0] == "planned"
    assert kinds[-2:] == ["published", "finished"]
    assert kinds.count("shard") == 2
    assert kinds.count("tensor") == len(merged.tensors)
    shards = [event.shard for event in merged.events if event.name == "shard"]
    assert shards == sorted(shards)
    for event in merged.events:
        assert json.loads(json.dumps(event.to_dict()))["event"] == event.name


def test_a_merge_leaves_what_was_planned(tmp_path):
    """Files, sizes, hashes, names and shapes are those of the plan and of the report."""
    import hashlib

    group = make_group(tmp_path / "group", sharded=True)
    plan = plan_group(group)

    merged = merge(group, tmp_path / "out")

    for shard, file in zip(plan.shards, merged.report["files"], strict=True):
        data = (merged.out / shard.name).read_bytes()
        assert file["name"] == shard.name
        assert file["size"] == len(data) == shard.nbytes
        assert file["sha256"] == hashlib.sha256(data).hexdigest()
    base = read_tensors(group.base)
    assert {n: t.shape for n, t in merged.tensors.items()} == {n: t.shape for n, t in base.items()}
    index = json.loads((merged.out / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == base.keys()
    assert not list(merged.out.glob(".*"))
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (merged.out / name).read_bytes() == (group.base / name).read_bytes()


def test_the_report_has_the_fixed_keys(group, tmp_path):
    """report.json on disk is what the last event carries, with every key of the design."""
    merged = merge(group, tmp_path / "out")

    stored = json.loads((merged.out / "resmerge" / "report.json").read_text())
    carried = json.loads(json.dumps(merged.report))
    # On disk, folders have no paths: a report may be published.
    for key in stored.keys() - {"sources", "recipe"}:
        assert stored[key] == carried[key], key
    assert str(group.base.parent) not in json.dumps(stored)
    assert {"version", "recipe", "sources", "environment", "summary", "files", "tensors"} <= set(
        stored
    )
    assert set(TENSOR_KEYS) <= set(stored["tensors"][0])
    assert {
        "tensors", "by_rule", "seconds", "bytes_read", "bytes_written", "peak_private_bytes",
        "kept_norm", "kept_cosine", "warnings",
    } <= set(stored["summary"])  # fmt: skip
    assert stored["summary"]["tensors"] == len(merged.tensors)
    assert "NaN" not in (merged.out / "resmerge" / "report.json").read_text()


@pytest.mark.parametrize("limit", [1, 3000, 8000, 10**9])
def test_weights_do_not_depend_on_the_shard_size(limit, tmp_path):
    """Cutting the output elsewhere changes no bit of any tensor."""
    group = make_group(tmp_path / "group")
    whole = merge(group, tmp_path / "whole")

    cut = merge(group, tmp_path / "cut", options=Options(max_shard_bytes=limit))

    assert cut.tensors.keys() == whole.tensors.keys()
    assert all(torch.equal(cut.tensors[name], whole.tensors[name]) for name in whole.tensors)
    rows = {row["name"]: row for row in whole.report["tensors"]}
    assert {row["name"]: row for row in cut.report["tensors"]} == rows


def test_stochastic_weights_do_not_depend_on_the_shard_size(tmp_path):
    """A seed belongs to a tensor, not to its place in the output."""
    group = make_group(tmp_path / "group")
    options = [Options(rounding="stochastic", seed=7, max_shard_bytes=n) for n in (None, 2000)]
    one, two = (merge(group, tmp_path / str(i), options=option) for i, option in enumerate(options))
    other = merge(group, tmp_path / "other", options=Options(rounding="stochastic", seed=8))

    assert all(torch.equal(one.tensors[name], two.tensors[name]) for name in one.tensors)
    assert not all(torch.equal(one.tensors[name], other.tensors[name]) for name in one.tensors)


@pytest.mark.parametrize("method", ["resmerge", "head_regression"])
def test_bytes_do_not_depend_on_the_memory_budget(tmp_path, method):
    """The least budget keeps fewer copies in memory and writes the same bytes."""
    group = make_group(tmp_path / "group", layers=1, hidden=256, experts=3)
    refused = plan_group(group, method=method, options=Options(memory_budget=1))
    least = Options(memory_budget=refused.peak_memory_bytes)
    plan = plan_group(group, method=method, options=least)
    assert not all(tensor.resident for tensor in plan.tensors.values())

    ample = merge(group, tmp_path / "ample", method=method)
    tight = merge(group, tmp_path / "tight", method=method, options=least)

    assert file_bytes(tight.out) == file_bytes(ample.out)
    assert tight.report["tensors"] == ample.report["tensors"]


def test_base_shards_do_not_change_the_weights(tmp_path):
    """The same model in one file or in two merges to the same tensors."""
    one = merge(make_group(tmp_path / "a"), tmp_path / "one")
    two = merge(make_group(tmp_path / "b", sharded=True), tmp_path / "two")

    assert one.tensors.keys() == two.tensors.keys()
    assert all(torch.equal(one.tensors[name], two.tensors[name]) for name in one.tensors)


@pytest.mark.parametrize("count", [1, 3])
def test_closing_the_generator_cancels_and_a_rerun_finishes(count, group, tmp_path):
    """After a cancel nothing has a final name; the rerun keeps the finished shards as they are."""
    whole = merge(group, tmp_path / "whole", options=SMALL)
    out = tmp_path / "out"
    events = start(group, out)
    done = until_shard(events, count)
    events.close()
    assert not list(out.glob("*.safetensors"))
    before = {name: (out / f"{name}.part").stat().st_ino for name in done}

    again = list(start(group, out))

    resumed = [event.shard for event in again if event.name == "shard" and event.resumed]
    assert resumed == done
    assert {name: (out / name).stat().st_ino for name in done} == before
    assert file_bytes(out) == file_bytes(whole.out)
    assert again[-1].report["tensors"] == whole.report["tensors"]


def test_closing_in_the_middle_of_a_shard_leaves_no_part_of_it(group, tmp_path):
    """An unfinished shard is removed when a run is cancelled."""
    out = tmp_path / "out"
    events = start(group, out, options=None)
    for event in events:
        if event.name == "tensor":
            break

    events.close()

    assert not list(out.glob("*.part"))
    assert not list(out.glob("*.safetensors"))


def test_closing_ends_while_the_reader_waits_for_room(group, tmp_path, monkeypatch):
    """A merge that is cancelled ends, also where no more may be read before something is merged."""
    monkeypatch.setattr("resmerge_stream.run.shards.READ_AHEAD_BYTES", 1)
    events = start(group, tmp_path / "out", options=None)
    assert next(event for event in events if event.name == "tensor")
    closing = threading.Thread(target=events.close, daemon=True)

    closing.start()
    closing.join(timeout=300)

    assert not closing.is_alive()


def test_a_finished_merge_is_not_done_again(group, tmp_path):
    """Running a plan whose result is there ends at once and changes nothing."""
    out = tmp_path / "out"
    list(start(group, out))
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}

    (event,) = start(group, out)

    assert event.name == "finished"
    assert event.already_there
    assert event.report["tensors"]
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


def test_sources_that_changed_between_runs_are_refused(group, tmp_path):
    """A continued run with another expert file would mix two merges."""
    events = start(group, tmp_path / "out")
    until_shard(events)
    events.close()
    edit_tensors(group.experts[1], lambda tensors: tensors[UP].add_(1))

    with pytest.raises(PlanRefusedError, match="sources changed"):
        list(start(group, tmp_path / "out"))


def test_a_foreign_folder_is_refused_by_the_run_itself(group, tmp_path):
    """What appeared after the plan is not overwritten either."""
    out = tmp_path / "out"
    plan = plan_group(group, out=out)
    out.mkdir()
    (out / "config.json").write_text("mine")

    with pytest.raises(OutputExistsError):
        list(run_merge(plan, out=out, work_dir=tmp_path / "work"))

    assert [path.name for path in out.iterdir()] == ["config.json"]
    assert (out / "config.json").read_text() == "mine"


def test_a_second_run_at_the_same_time_stops(group, tmp_path):
    """Two processes do not write one folder; the first is not disturbed."""
    out = tmp_path / "out"
    first = start(group, out)
    until_shard(first)

    with pytest.raises(StoppedError, match="another process"):
        list(start(group, out))

    assert list(first)[-1].name == "finished"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("which", [0, 2])
def test_a_weight_that_is_not_finite_is_refused(value, which, group, tmp_path):
    """NaN and infinities name their tensor and checkpoint, and leave no weight file behind."""
    folder = group.folders[which]
    edit_tensors(folder, lambda tensors: tensors[UP].view(-1).__setitem__(100, value))

    with pytest.raises(NonFiniteError, match=UP) as caught:
        list(start(group, tmp_path / "out"))

    assert str(folder) in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["model.norm.weight", "model.embed_tokens.weight"])
def test_elementwise_tensors_are_checked_too(name, group, tmp_path):
    """A NaN in a norm or an embedding is refused like one in a matrix."""
    edit_tensors(group.experts[1], lambda t: t[name].view(-1).__setitem__(3, float("nan")))

    with pytest.raises(NonFiniteError, match=name):
        merge(group, tmp_path / "out")


def test_an_overflow_of_the_output_dtype_is_refused(group, tmp_path):
    """A weight beyond float16 is an error, not an infinity in the file."""
    for folder in group.folders:
        edit_tensors(folder, lambda tensors: tensors[UP].add_(1e5))

    with pytest.raises(NonFiniteError, match="overflows"):
        merge(group, tmp_path / "out", dtype="float16")

    assert not list((tmp_path / "out").glob("*.safetensors"))


def test_an_overflow_of_an_unchanged_tensor_is_refused(group, tmp_path):
    """A weight beyond float16 is refused also where no expert changed it."""
    for folder in (group.base, *group.experts):
        edit_tensors(folder, lambda tensors: tensors[UP].fill_(1e5))

    with pytest.raises(NonFiniteError, match="overflows"):
        merge(group, tmp_path / "out", dtype="float16")


KILLED = """
import os, random, signal, sys, time
from pathlib import Path
from resmerge_stream import Options, plan_merge
from resmerge_stream.run.engine import run_merge
from resmerge_stream.recipe import ModelRef, Recipe

top, base, *experts = sys.argv[1:]
top = Path(top)
recipe = Recipe(ModelRef(base), tuple(map(ModelRef, experts)), "resmerge")

def run(out):
    log = (top / f"{out}.log").open("a")
    plan = plan_merge(recipe, Options(max_shard_bytes=8000), out=top / out)
    for event in run_merge(plan, out=top / out, work_dir=top / "work"):
        if event.name == "shard":
            print(event.shard, int(event.resumed), file=log, flush=True)
    print("end", file=log, flush=True)

def forked(out, kill_after=None):
    # Forked before any tensor work, so that no thread is lost.
    pid = os.fork()
    if pid == 0:
        run(out)
        os._exit(0)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(pid, signal.SIGKILL)
    return os.waitpid(pid, 0)[1]

began = time.monotonic()
assert forked("whole") == 0
took = time.monotonic() - began
chance, kills = random.Random(int.from_bytes(b"kill")), 0
for moment in range(7):
    status = forked("killed", took * chance.random())
    if os.WIFSIGNALED(status):
        kills += 1
assert forked("killed") == 0
print(kills)
"""


@pytest.mark.slow
def test_a_merge_killed_at_random_moments_ends_with_the_same_bytes(tmp_path):
    """SIGKILL costs at most the shard in work: no finished shard is merged twice."""
    group = make_group(tmp_path / "group", hidden=32, layers=4)

    done = run_python(KILLED, str(tmp_path), *(str(folder) for folder in group.folders))

    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 0
    assert file_bytes(tmp_path / "killed") == file_bytes(tmp_path / "whole")
    lines = (tmp_path / "killed.log").read_text().splitlines()
    fresh = [line for line in lines if line.endswith(" 0")]
    assert len(fresh) == len(set(fresh))
    assert not list((tmp_path / "killed").glob("*.part"))


CUT_SHORT = """
import os, sys
from pathlib import Path
from resmerge_stream import plan_merge
from resmerge_stream.report import card
from resmerge_stream.run.engine import run_merge
from resmerge_stream.recipe import ModelRef, Recipe

card.gates_png = lambda report: b""
top, base, *experts = sys.argv[1:]
recipe = Recipe(ModelRef(base), tuple(map(ModelRef, experts)), "resmerge")
replace = os.replace

def run(out, steps):
    plan = plan_merge(recipe, out=out)
    events = run_merge(plan, out=out, work_dir=top + "/work")
    while next(events).name != "shard" or not list(Path(out).glob("*2.safetensors.part")):
        pass
    def dying(*args, **kwargs):
        nonlocal steps
        steps -= 1
        if steps < 0:
            os._exit(9)
        replace(*args, **kwargs)
    os.replace = dying
    list(events)
    os._exit(0)

steps = 0
while True:
    pid = os.fork()
    if pid == 0:
        run(f"{top}/out{steps}", steps)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert code in (0, 9), code
    if code == 0:
        break
    steps += 1
print(steps)
"""


@pytest.mark.slow
def test_a_publication_cut_short_is_finished_by_a_rerun(tmp_path):
    """A death between any two renames of the publication leaves what a rerun completes.

    An index is there only when all of its shards are.
    """
    group = make_group(tmp_path / "group", experts=2, layers=1, sharded=True)
    whole = merge(group, tmp_path / "whole")
    shards = {path.name for path in whole.out.glob("*.safetensors")}
    died = run_python(CUT_SHORT, str(tmp_path), *(str(path) for path in group.folders))
    assert died.returncode == 0, died.stderr
    assert int(died.stdout) >= 6

    for steps in range(int(died.stdout)):
        out = tmp_path / f"out{steps}"
        if (out / "model.safetensors.index.json").exists():
            assert {path.name for path in out.glob("*.safetensors")} == shards
        plan = plan_group(group, out=out)
        assert not plan.refused, plan.problems
        list(run_merge(plan, out=out, work_dir=tmp_path / "work"))

        assert file_bytes(out) == file_bytes(whole.out)
        assert not [*out.glob("*.part"), *out.glob(".*")]


MEMORY = """
import sys, threading
from resmerge_stream import plan_merge
from resmerge_stream.report import card
from resmerge_stream.run.engine import run_merge
from resmerge_stream.device import private_memory
from resmerge_stream.recipe import ModelRef, Recipe
card.gates_png = lambda report: b""
out, base, *experts = sys.argv[1:]
plan = plan_merge(Recipe(ModelRef(base), tuple(map(ModelRef, experts)), "resmerge"), out=out)
before, peak, done = private_memory(), 0, threading.Event()
def watch():
    global peak
    while not done.wait(0.002):
        peak = max(peak, private_memory())
threading.Thread(target=watch, daemon=True).start()
list(run_merge(plan, out=out, work_dir=out + ".work"))
done.set()
print(max(peak, private_memory()) - before, plan.peak_memory_bytes, plan.write_bytes)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_layers(tmp_path):
    """Six times the layers take the same private memory, which is less than was planned."""
    grown, written = [], []
    for layers in (3, 18):
        folder = tmp_path / str(layers)
        group = make_group(folder, hidden=320, layers=layers, experts=2)
        done = run_python(MEMORY, str(folder / "out"), *(str(path) for path in group.folders))
        assert done.returncode == 0, done.stderr
        growth, planned, write_bytes = map(int, done.stdout.split())
        assert growth <= planned
        grown.append(growth)
        written.append(write_bytes)

    # Each model is 36 MB larger, and keeping any one would show; which tensors are in work at the
    # same time differs from run to run, and the more of them there are the more often it is many.
    assert written[1] - written[0] > 36_000_000
    assert grown[1] <= grown[0] + 25_000_000


def test_random_options_give_one_result(tmp_path):
    """However a merge is cut and interrupted, its tensors have the same bits."""
    group = make_group(tmp_path / "group", experts=2)
    whole = merge(group, tmp_path / "whole").tensors
    chance = random.Random(11)
    for number in range(3):
        out = tmp_path / f"out{number}"
        options = Options(max_shard_bytes=chance.randrange(1000, 12_000))
        for _ in range(chance.randrange(3)):
            events = start(group, out, options=options)
            for _ in range(chance.randrange(1, 12)):
                next(events)
            events.close()

        list(start(group, out, options=options))

        got = read_tensors(out)
        assert got.keys() == whole.keys()
        assert all(torch.equal(got[name], whole[name]) for name in whole)
        assert not os.listdir(tmp_path / "work") or out.exists()
