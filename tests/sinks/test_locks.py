"""Who may write into a folder: one run, on whichever machine; also where no locks are kept."""

import errno
import fcntl
import os

import pytest

from resmerge_stream.errors import StoppedError
from resmerge_stream.sinks import FolderSink
from resmerge_stream.sinks.folder import LOCK, MARKER, discard
from resmerge_stream.sinks.layout import plan_shards
from resmerge_stream.sinks.locks import keeps_locks
from resmerge_stream.specs import TensorSpec
from tests.support.checkpoints import make_group, plan_group

SPECS = [TensorSpec(name, "U8", (8,)) for name in ("a", "b")]
SHARDS = plan_shards([[SPECS[0]], [SPECS[1]]], 1000)
FILES = [{"name": shard.name, "size": shard.nbytes} for shard in SHARDS]
SMALL = {"config.json": b"{}", "resmerge/report.json": b"{}"}


def machine(tmp_path, name):
    """Return a run's sink on a shared folder, with the work folder of a machine of its own."""
    return FolderSink(tmp_path / "out", "p", tmp_path / name, {"0": {}})


def write(sink, shard):
    """Write and keep one shard."""
    writer = sink.open_shard(shard)
    writer.write(memoryview(b"12345678"))
    sink.keep(shard, {"size": shard.nbytes, "sha256": writer.finish(), "tensors": []})


@pytest.fixture
def without_locks(monkeypatch):
    """Have the file system refuse locks, as mounted buckets do."""

    def refused(file, kind):
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

    monkeypatch.setattr(fcntl, "flock", refused)


def test_a_run_on_another_machine_is_refused(tmp_path):
    """The lock lies with the output: a work folder of one's own makes no difference."""
    first = machine(tmp_path, "a").open()
    write(first, SHARDS[0])

    with pytest.raises(StoppedError, match="another process"):
        machine(tmp_path, "b").open()
    with pytest.raises(StoppedError, match="another process"):
        discard(tmp_path / "out")

    write(first, SHARDS[1])
    assert first.lost(FILES) == []
    first.publish(SMALL)
    first.close()
    assert LOCK not in os.listdir(tmp_path / "out")


def test_an_unfinished_run_leaves_no_lock_behind_that_holds(tmp_path):
    """What a stopped run left is taken over at once, or discarded with its lock's file."""
    first = machine(tmp_path, "a").open()
    write(first, SHARDS[0])
    first.close()

    machine(tmp_path, "b").open().close()

    assert MARKER in discard(tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("without_locks")
def test_without_locks_the_run_that_was_taken_over_stops(tmp_path):
    """Nobody can be refused, so the mark says whose the folder is, and the cause is said."""
    first = machine(tmp_path, "a").open()
    write(first, SHARDS[0])
    second = machine(tmp_path, "b").open()

    with pytest.raises(StoppedError, match="keeps no locks"):
        write(first, SHARDS[1])
    with pytest.raises(StoppedError, match="keeps no locks"):
        first.publish(SMALL)

    for shard in SHARDS:
        write(second, shard)
    assert second.lost(FILES) == []
    second.publish(SMALL)
    first.close()
    second.close()


def test_a_shard_that_became_short_is_not_published(tmp_path):
    """Whatever a file system says of locks and marks: done is never said over a short shard."""
    sink = machine(tmp_path, "a").open()
    for shard in SHARDS:
        write(sink, shard)
    assert sink.lost(FILES) == []
    os.truncate(tmp_path / "out" / f"{SHARDS[0].name}.part", 9)

    with pytest.raises(StoppedError, match="has 9 of"):
        sink.publish(SMALL)
    sink.close()

    assert sorted(os.listdir(tmp_path / "out")) == sorted(
        [MARKER, LOCK, *(f"{shard.name}.part" for shard in SHARDS)]
    )


@pytest.mark.usefixtures("without_locks")
def test_the_plan_says_that_no_locks_are_kept(tmp_path):
    """A second run that would be refused elsewhere is said to stop the first."""
    group = make_group(tmp_path / "group", experts=2)

    plan = plan_group(group, out=tmp_path / "out")

    assert not keeps_locks(tmp_path / "out")
    assert any(warning.kind == "no-locks" for warning in plan.warnings)
    assert not plan.refused
