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


@pytest.fixture
def stopping(env, tmp_path):
    """An environment in which a job's first start stops after its first shard, on some nodes."""

    def on(*nodes):
        site = tmp_path / "site"
        site.mkdir()
        (site / "sitecustomize.py").write_text(STOPPED_ONCE)
        return {
            **env, "PYTHONPATH": f"{site}:{env['PYTHONPATH']}", "STOPS_ON": " ".join(nodes),
            "STOPPED_AT": str(tmp_path / "stopped"),
        }  # fmt: skip

    return on


def stopped(tmp_path):
    """Return the nodes that have stopped."""
    return [path.name for path in tmp_path.glob("stopped-*")]


def test_a_requeued_job_continues(cluster, group, expected, env, stopping, tmp_path):
    """`scontrol requeue` after the first shard: it starts again, keeps the shard, same bytes."""
    script = written(group, tmp_path, env, "--nodes", "2")
    job = cluster.submit(script, stopping("one", "two"))
    cluster.wait(lambda: len(stopped(tmp_path)) == 2, "two shards are made", 300)
    kept = {path.name: path.stat().st_ino for path in (tmp_path / "out").glob("*.part")}

    cluster.run("scontrol", "requeue", job)
    cluster.waiting(job)
    cluster.wait_until_idle()
    cluster.start_again(job)

    assert cluster.finish(job) == {"COMPLETED"}, log_of(tmp_path)
    assert file_bytes(tmp_path / "out") == expected
    assert kept
    for name, number in kept.items():
        assert (tmp_path / "out" / name.removesuffix(".part")).stat().st_ino == number


@pytest.mark.slow
@pytest.mark.parametrize("options", [("--array", "2"), ("--nodes", "2")], ids=["array", "nodes"])
def test_a_killed_node_is_got_over(options, cluster, group, expected, env, stopping, tmp_path):
    """An array's task goes to the other node, a job waits until the node is back; same bytes."""
    script = written(group, tmp_path, env, *options)
    exclusive = ["--exclusive"] if options[0] == "--array" else []
    job = cluster.submit(script, stopping("two"), *exclusive)
    cluster.wait(lambda: stopped(tmp_path), "a shard is made on the second node", 300)

    cluster.kill_node("two")
    try:
        cluster.waiting(job)
        if exclusive:
            cluster.start_again(job)
            assert cluster.finish(job) == {"COMPLETED"}, log_of(tmp_path)
    finally:
        cluster.start_node("two")

    if not exclusive:
        # SLURM 22.05 says once more that the node shall end the job, and would end the new start.
        cluster.wait_until_idle()
        cluster.start_again(job)
    assert cluster.finish(job) == {"COMPLETED"}, log_of(tmp_path)
    assert file_bytes(tmp_path / "out") == expected


STOPPED_ONCE = '''
"""Has the first start of a job stop after its first shard, on the nodes that are named."""
import os, sys, time

is_first = os.environ.get("SLURM_RESTART_COUNT", "0") == "0"
node = os.environ.get("SLURMD_NODENAME")
if is_first and node in os.environ["STOPS_ON"].split() and "-m" in sys.orig_argv:
    from resmerge_stream.sinks.folder import FolderSink

    keep = FolderSink.keep

    def kept(self, shard, entry):
        keep(self, shard, entry)
        open(os.environ["STOPPED_AT"] + "-" + node, "w").close()
        while True:
            time.sleep(1)

    FolderSink.keep = kept
'''
