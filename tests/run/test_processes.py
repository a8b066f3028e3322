"""Several processes on one plan. Here each is a thread with its own end of a real store.

Whole processes under a real launcher: `tests/run/test_launchers.py`.
"""

import itertools
import os
import shutil
import signal
import threading
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import pytest
from torch.distributed import HashStore

from resmerge_stream import run_merge
from resmerge_stream.errors import NonFiniteError, PlanRefusedError, StoppedError
from resmerge_stream.planning.plan import Options
from resmerge_stream.run.events import Event, Progressed
from resmerge_stream.run.group import Group, OthersStoppedError, launched
from resmerge_stream.run.processes import Processes, WorkList, _ended_in_words
from resmerge_stream.run.progress import Progress
from tests.support.checkpoints import Group as Models
from tests.support.checkpoints import edit_tensors, file_bytes, make_group, merge, plan_group

pytestmark = pytest.mark.usefixtures("without_picture")
SMALL = Options(max_shard_bytes=3000)
UP = "model.layers.1.mlp.up_proj.weight"


@dataclass
class Process:
    """How one process of a run ended."""

    events: list[Event] = field(default_factory=list)
    error: BaseException | None = None
    told: bool = False


def run_together(
    models: Models,
    outs: list[Path],
    *,
    options: Options = SMALL,
    seeds: list[int] | None = None,
    **recipe,
) -> list[Process]:
    """Run one merge in as many threads as there are output folders."""
    store, done = HashStore(), [Process() for _ in outs]

    def work(rank: int) -> None:
        group = Group(lambda: store, rank, len(outs)).open()
        mine = done[rank]
        chosen = Options(max_shard_bytes=options.max_shard_bytes, seed=(seeds or [0] * 9)[rank])
        try:
            plan = plan_group(models, out=outs[rank], options=chosen, **recipe)
            place = {"out": outs[rank], "work_dir": outs[0].parent / "work"}
            for event in run_merge(plan, processes=Processes(group), **place):
                mine.events.append(event)
        except BaseException as exc:
            mine.error, mine.told = exc, group.fail(exc)
        finally:
            group.close()

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(len(outs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=100)
    return done


@pytest.mark.parametrize("count", [2, 3])
def test_any_number_of_processes_leaves_the_same_bytes_and_rows(tmp_path, count):
    """E4: weights, index, config, and every row of the report are those of one process."""
    models = make_group(tmp_path / "group", sharded=True)
    alone = merge(models, tmp_path / "alone", options=SMALL)

    done = run_together(models, [tmp_path / "out"] * count)

    assert [process.error for process in done] == [None] * count
    assert file_bytes(tmp_path / "out") == file_bytes(alone.out)
    report = done[0].events[-1].report
    assert report["tensors"] == alone.report["tensors"]
    assert report["files"] == alone.report["files"]
    assert report["environment"]["processes"] == count
    for key in ("bytes_read", "bytes_written", "kept_cosine", "by_rule", "warnings"):
        assert report["summary"][key] == alone.report["summary"][key]


def test_the_main_process_tells_of_everything_once(tmp_path):
    """Its events are those of a run by one process: each tensor and shard once, rising counts."""
    models = make_group(tmp_path / "group", sharded=True)

    done = run_together(models, [tmp_path / "out"] * 3)

    told = [event for event in done[0].events if event.name in ("tensor", "shard")]
    tensors = [event.tensor for event in told if event.name == "tensor"]
    shards = [event for event in told if event.name == "shard"]
    plan = done[0].events[0].plan
    assert len(tensors) == len(set(tensors)) == plan["tensors"]
    assert [event.shards_done for event in shards] == list(range(1, len(plan["shards"]) + 1))
    assert [event.bytes_written for event in told] == sorted(e.bytes_written for e in told)
    assert done[0].events[-1].name == "finished"
    assert {e.name for process in done[1:] for e in process.events} <= {
        "planned", "tensor", "shard", "progress",
    }  # fmt: skip


def test_a_run_is_continued_by_another_number_of_processes(tmp_path):
    """Shards that one process finished are not merged again by three."""
    models, out = make_group(tmp_path / "group", sharded=True), tmp_path / "out"
    expected = merge(models, tmp_path / "alone", options=SMALL)
    plan = plan_group(models, out=out, options=SMALL)
    events = run_merge(plan, out=out, work_dir=tmp_path / "work")
    first = next(event for event in events if event.name == "shard")
    events.close()

    done = run_together(models, [out] * 3)

    shards = {event.shard: event for event in done[0].events if event.name == "shard"}
    assert shards[first.shard].resumed
    assert sum(event.resumed for event in shards.values()) == 1
    assert file_bytes(out) == file_bytes(expected.out)
    assert done[0].events[-1].report["tensors"] == expected.report["tensors"]


def test_a_merge_of_copies_is_refused_in_every_process(tmp_path):
    """The main process says that nothing differs, the others end with it; no folder is made."""
    models = make_group(tmp_path / "group", experts=0)
    shutil.copytree(models.base, tmp_path / "copy")
    same = Models(models.base, (tmp_path / "copy",))

    main, *others = run_together(same, [tmp_path / "out"] * 3)

    assert isinstance(main.error, PlanRefusedError)
    assert "nothing differs" in str(main.error)
    assert all(isinstance(other.error, OthersStoppedError) for other in others)
    assert not (tmp_path / "out").exists()


def test_what_is_counted_over_the_whole_model_is_counted_once(tmp_path):
    """TIES over the whole model: the main process counts, the others get its numbers."""
    models = make_group(tmp_path / "group", sharded=True)
    recipe = {"method": "ties", "parameters": {"trim": "model"}}
    alone = merge(models, tmp_path / "alone", options=SMALL, **recipe)

    done = run_together(models, [tmp_path / "out"] * 2, **recipe)

    assert [process.error for process in done] == [None, None]
    assert file_bytes(tmp_path / "out") == file_bytes(alone.out)
    assert done[0].events[-1].report["counted"] == alone.report["counted"]
    assert not [event for event in done[1].events if event.name == "counted"]


def test_a_weight_that_is_no_number_ends_all_and_leaves_nothing(tmp_path):
    """Whichever process meets it, the main one says so, and the output folder is removed."""
    models = make_group(tmp_path / "group")
    edit_tensors(models.experts[1], lambda t: t[UP].view(-1).__setitem__(3, float("nan")))

    done = run_together(models, [tmp_path / "out"] * 2)

    assert isinstance(done[0].error, NonFiniteError)
    assert UP in str(done[0].error)
    assert done[1].told or done[1].error is None
    assert not (tmp_path / "out").exists()


def test_processes_that_plan_differently_all_stop(tmp_path):
    """A process whose plan is another one stops the run before anything is written."""
    models = make_group(tmp_path / "group")

    done = run_together(models, [tmp_path / "out"] * 2, seeds=[0, 1])

    assert isinstance(done[0].error, PlanRefusedError)
    assert "plans another merge" in str(done[0].error)
    assert done[1].told
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_not_shared_is_refused(tmp_path, monkeypatch):
    """Each process looks for what the main one wrote: another machine's folder is no target."""
    monkeypatch.setattr("resmerge_stream.sinks.folder._SEEN_S", 0.2)
    models = make_group(tmp_path / "group")

    done = run_together(models, [tmp_path / "out", tmp_path / "elsewhere"])

    assert isinstance(done[0].error, PlanRefusedError)
    assert "need a folder that all of them share" in str(done[0].error)
    assert not (tmp_path / "elsewhere").exists()


def test_a_process_that_falls_silent_stops_the_run():
    """A process whose machine is gone says nothing any more: the main one stops and says which."""
    store = HashStore()
    main = Group(lambda: store, 0, 2, silent_s=0.0).open()
    gone = Group(lambda: store, 1, 2).open()
    gone.close()
    main._looked -= 60
    main.check()  # hears it for the last time

    main._looked -= 60
    with pytest.raises(StoppedError, match="process 1 was not heard of"):
        main.check()

    main.close()


def test_an_end_by_the_launcher_is_not_forgotten():
    """SIGTERM that came in the middle of a finalizer, where errors are lost, still ends the run."""
    main = Group(HashStore, 0, 2).open()
    main.is_over = main.is_ended = True

    for _ in range(2):
        with pytest.raises(StoppedError, match="the launcher ended this run"):
            main.check()

    main.close()


@pytest.mark.usefixtures("default_signals")
@pytest.mark.parametrize("told", [True, False])
def test_an_end_by_the_launcher_says_what_is_missing(told):
    """SIGTERM names the shards, whether it comes while the run works or while an event is told."""
    main = Group(HashStore, 0, 2).open()
    branch = SimpleNamespace(plan=SimpleNamespace(shards=[SimpleNamespace(name="one")]), files={})

    def own():
        yield Progressed()
        if not told:
            os.kill(os.getpid(), signal.SIGTERM)
        yield Progressed()

    def run():
        for _ in Processes(main).everyones(own(), branch, Progress(lambda: 0)):
            if told:
                os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(StoppedError, match="missing: 'one'"), _ended_in_words(main):
        run()

    main.close()


def test_the_others_end_when_the_main_process_fails():
    """A process that waits for the main one is not left waiting, and says nothing itself."""
    store = HashStore()
    main, other = Group(lambda: store, 0, 2).open(), Group(lambda: store, 1, 2).open()
    main.fail(PlanRefusedError("no"))

    with pytest.raises(OthersStoppedError) as stopped:
        other.wait("plan")

    assert other.fail(stopped.value)
    main.close()
    other.close()


def test_a_launcher_is_known_by_its_environment(monkeypatch):
    """Without all of a launcher's variables a process is alone, whatever some of them say."""
    assert launched() == (0, 1)

    monkeypatch.setenv("WORLD_SIZE", "4")
    assert launched() == (0, 1)

    for key, value in {"RANK": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(key, value)
    assert launched() == (2, 4)


def test_each_shard_goes_to_one_process_and_the_free_one_gets_it():
    """Two take in turn; when one is slow, the other takes what is left."""
    tickets, shards = itertools.count().__next__, [f"shard {number}" for number in range(6)]
    slow, fast = (iter(WorkList(shards, tickets, 2)) for _ in range(2))

    taken = [next(slow), *fast]

    assert taken == shards
    assert next(slow, None) is None


def test_one_process_alone_may_read_everything_ahead():
    """Nobody else wants its shards."""
    shards = [f"shard {number}" for number in range(6)]

    work = WorkList(shards, itertools.count().__next__)

    assert list(work.ahead()) == shards
    assert list(work) == shards


def test_what_is_taken_ahead_gets_less_towards_the_end():
    """Far from the end a process takes several shards ahead, at the end one: nobody idles long."""
    shards = [f"shard {number}" for number in range(40)]
    work = WorkList(shards, itertools.count().__next__, 2)
    merging, reading = iter(work), work.ahead()

    waiting, most = -1, []
    for _ in merging:
        while next(reading, None) is not None:
            waiting += 1
        most.append(waiting)
        waiting -= 1

    assert most[0] == 8
    assert most == sorted(most, reverse=True)
    assert most[-3:] == [1, 1, 0]


def test_processes_end_together():
    """One that is done stays until the main one is: lost at its end, that would need all again."""
    store, order = HashStore(), []
    main, other = (Group(lambda: store, rank, 2).open() for rank in range(2))

    def leave() -> None:
        other.leave()
        order.append("other")
        other.close()

    thread = threading.Thread(target=leave)
    thread.start()
    thread.join(0.5)  # long enough for one that does not wait
    order.append("main")
    main.leave()
    main.close()
    thread.join()

    assert order == ["main", "other"]


def test_one_that_is_done_hears_of_a_failure_of_the_main_one():
    """It ends as the others do, so that a launcher starts it again with them."""
    store = HashStore()
    main, other = (Group(lambda: store, rank, 2).open() for rank in range(2))

    main.fail(StoppedError("the line broke."))

    with pytest.raises(OthersStoppedError):
        other.leave()
    main.close()
    other.close()
