"""A real SLURM of two nodes on this machine runs what `submit --slurm` writes: same bytes."""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from resmerge_stream import Options
from tests.support import slurm
from tests.support.checkpoints import ROOT, child_environment, file_bytes, make_group, merge

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(slurm.missing()), reason=slurm.missing() or "installed"),
]


@pytest.fixture(scope="module")
def cluster():
    """Two nodes that run; in a folder with a short name, since sockets lie in it."""
    folder = Path(tempfile.mkdtemp(prefix="slurm"))
    try:
        with slurm.Cluster(folder) as running:
            yield running
    except slurm.NotStartedError as exc:
        pytest.skip(f"SLURM does not start here: {exc}")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def group(tmp_path_factory):
    """A group whose merge has eight files."""
    return make_group(tmp_path_factory.mktemp("slurm") / "group", experts=2)


@pytest.fixture(scope="module")
def expected(group, tmp_path_factory):
    """What one process makes of it."""
    out = tmp_path_factory.mktemp("expected") / "out"
    return file_bytes(merge(group, out, options=Options(max_shard_bytes=3000)).out)


@pytest.fixture
def env(tmp_path):
    """The environment of a user who has this package: its commands are on the path."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for name, words in (
        ("resmerge-stream", "-m resmerge_stream"), ("torchrun", "-m torch.distributed.run"),
    ):  # fmt: skip
        (tools / name).write_text(f'#!/bin/sh\nexec {sys.executable} {words} "$@"\n')
        (tools / name).chmod(0o755)
    return {
        **child_environment(), "PATH": f"{tools}:{slurm.PATH}", "OMP_NUM_THREADS": "1",
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
    }  # fmt: skip


def written(group, tmp_path, env, *options):
    """Have the batch file written, as a user does; it asks for no more than the nodes have."""
    base, *experts = (str(folder) for folder in group.folders)
    words = ["--base", base, *(word for one in experts for word in ("--expert", one))]
    words += ["--method", "resmerge", "--max-shard-size", "3KB", "--out", str(tmp_path / "out")]
    script = tmp_path / "merge.sbatch"
    done = subprocess.run(
        ["resmerge-stream", "submit", "--slurm", *words, "--cpus", "1", *options, "-o", script],
        env=env, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return script


def log_of(tmp_path):
    """Return what the jobs printed."""
    return "\n".join(path.read_text()[-3000:] for path in sorted(tmp_path.glob("slurm-*.out")))


def test_two_nodes_share_a_merge(cluster, group, expected, env, tmp_path):
    """`srun torchrun`: one process on each node, one folder."""
    job = cluster.submit(written(group, tmp_path, env, "--nodes", "2"), env)

    assert cluster.finish(job) == {"COMPLETED"}, log_of(tmp_path)
    assert file_bytes(tmp_path / "out") == expected


def test_an_array_merges_in_parts(cluster, group, expected, env, tmp_path):
    """Each task is a part, and one that runs once more finds the merge done."""
    script = written(group, tmp_path, env, "--array", "3")
    job = cluster.submit(script, env)

    assert cluster.finish(job) == {"COMPLETED"}, log_of(tmp_path)
    assert file_bytes(tmp_path / "out") == expected
    again = cluster.submit(script, env, "--array=1")
    assert cluster.finish(again) == {"COMPLETED"}, log_of(tmp_path)
    assert "already holds the finished result" in log_of(tmp_path)


def test_a_requeued_job_continues(cluster, group, expected, env, tmp_path):
    """`scontrol requeue` after the first shard: it starts again, keeps the shard, same bytes."""
    script = written(group, tmp_path, env, "--nodes", "2")
    (tmp_path / "once.py").write_text(STOPPED_ONCE)
    # The first start stops within the merge until SLURM ends it; the next one does not.
    stopping = {**env, "PYTHONPATH": f"{tmp_path / 'site'}:{env['PYTHONPATH']}"}
    (tmp_path / "site").mkdir()
    (tmp_path / "once.py").rename(tmp_path / "site" / "sitecustomize.py")
    stopping["STOPPED_AT"] = str(tmp_path / "stopped")
    job = cluster.submit(script, stopping)
    cluster.wait(lambda: len(list(tmp_path.glob("stopped-*"))) == 2, "two shards are made", 300)
    kept = {path.name: path.stat().st_ino for path in (tmp_path / "out").glob("*.part")}

    cluster.run("scontrol", "requeue", job)
    cluster.wait(lambda: cluster.states(job) == {"PENDING"}, "the job waits again")
    # SLURM lets two minutes pass before it starts a job again.
    cluster.run("scontrol", "update", f"JobId={job}", "StartTime=now")

    assert cluster.finish(job) == {"COMPLETED"}, log_of(tmp_path)
    assert file_bytes(tmp_path / "out") == expected
    assert kept
    for name, number in kept.items():
        assert (tmp_path / "out" / name.removesuffix(".part")).stat().st_ino == number


STOPPED_ONCE = '''
"""Has the first start of a job stop after its first shard."""
import os, sys, time

if os.environ.get("SLURM_RESTART_COUNT", "0") == "0" and "RANK" in os.environ:
    from resmerge_stream.sinks.folder import FolderSink

    keep = FolderSink.keep

    def kept(self, shard, entry):
        keep(self, shard, entry)
        open(os.environ["STOPPED_AT"] + "-" + os.environ["RANK"], "w").close()
        while True:
            time.sleep(1)

    FolderSink.keep = kept
'''
