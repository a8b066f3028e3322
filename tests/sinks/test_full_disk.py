"""A disk that is full for real: a file system of its own, of some hundred kilobytes."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from loopback_hub import Hook
from resmerge_stream import run_merge
from resmerge_stream.errors import StoppedError
from tests.support.checkpoints import file_bytes, make_group, merge, plan_group
from tests.support.hub_runs import running_bench

pytestmark = pytest.mark.usefixtures("without_picture")
SIZE = 2_000_000


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of two megabytes; only root may mount one."""
    place = tmp_path / "disk"
    place.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", str(place)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        pytest.skip(f"a small disk cannot be mounted here: {done.stderr.strip()}")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)  # lazy: a process may still look


def fill(disk: Path, left: int) -> Path:
    """Fill a disk but for some bytes; the file is removed to make room again."""
    free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
    filler = disk / "filler"
    filler.write_bytes(bytes(max(free - left, 0)))
    return filler


@pytest.mark.parametrize("left", [0, 8_192, 90_000, 180_000])
def test_a_full_disk_stops_a_merge_and_room_lets_it_go_on(left: int, disk: Path, tmp_path: Path):
    """Whether at the mark, in a shard, or at the last small files: exit 3, then the same bytes."""
    group = make_group(tmp_path / "group", hidden=48, experts=2, sharded=True)
    whole = merge(group, tmp_path / "whole")
    out, work = disk / "out", disk / "work"
    plan = plan_group(group, out=out)
    filler = fill(disk, left)

    with pytest.raises(StoppedError, match="No space left on device") as stopped:
        list(run_merge(plan, out=out, work_dir=work))
    plan.close()
    finals = [path.name for path in out.glob("*.safetensors")] if out.exists() else []
    filler.unlink()
    list(run_merge(plan_group(group, out=out), out=out, work_dir=work))

    assert stopped.value.exit_code == 3
    assert str(disk) in str(stopped.value)
    assert not finals or left > 100_000
    assert file_bytes(out) == file_bytes(whole.out)


@pytest.mark.slow
def test_a_cache_that_takes_nothing_more_is_a_problem(disk: Path, tmp_path: Path):
    """A disk that only reads: refused by the plan where small files lack that are copied last."""
    subprocess.run(["mount", "-o", "remount,size=9M", str(disk)], check=True)
    with running_bench(tmp_path / "bench") as bench:
        env = bench.env() | {"HF_HUB_CACHE": str(disk / "hub")}

        def run(command: str, out: str) -> subprocess.CompletedProcess[str]:
            words = [command, *bench.sources(), "--method", "mean", "--out", out]
            return subprocess.run(
                [sys.executable, "-m", "resmerge_stream", *words],
                env=env, cwd=bench.folder, capture_output=True, text=True, check=False,
            )  # fmt: skip

        assert run("plan", "out").returncode == 0
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        lacking = run("plan", "out")
        subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
        assert run("merge", "out").returncode == 0
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        whole = run("plan", "other")

    assert lacking.returncode == 2, lacking.stdout + lacking.stderr
    assert f"nothing can be written to '{disk / 'hub'}'" in lacking.stdout
    assert "HF_HOME" in lacking.stdout
    assert whole.returncode == 0, whole.stdout + whole.stderr


@pytest.mark.slow
def test_a_full_disk_stops_a_publication_and_room_lets_it_go_on(disk: Path, tmp_path: Path):
    """Shards that wait for their upload fill the disk: exit 3, the disk's own words, then equal."""
    with running_bench(tmp_path / "bench") as bench:
        arguments = ["merge", *bench.sources(), "--push-to", "alice/full", "--json"]
        arguments += ["--work-dir", str(disk / "work")]
        bench.hub.faults.add(
            Hook(call=lambda: fill(disk, 30_000)), method="POST", path="/branch/", times=1
        )

        stopped = bench.run(*arguments)
        (disk / "filler").unlink()
        done = bench.run(*arguments)

        assert stopped.code == 3, stopped.err
        assert "No space left on device" in stopped.err
        assert "network" not in stopped.err
        assert done.code == 0, done.err
        assert bench.published("alice/full") == bench.expected()
