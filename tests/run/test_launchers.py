"""Real processes under real launchers, Hub to Hub and into a folder. Few, since each imports torch.

What can be told without a launcher: `tests/run/test_processes.py`.
"""

import hashlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from loopback_hub import Hold, Hook, LoopbackHub
from tests.support.hub_runs import Bench, Run, make_bench

# Port 0: any that is free, so that two of these can run on one machine.
ACCELERATE = ["-m", "accelerate.commands.launch", "--main_process_port", "0"]
ACCELERATE += ["--multi_gpu", "--num_processes"]
TORCHRUN = ["-m", "torch.distributed.run", "--nproc-per-node"]


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    """A Hub with a group of models, shared by the tests of this file."""
    folder = tmp_path_factory.mktemp("processes")
    with LoopbackHub(folder / "hub") as hub:
        bench = make_bench(folder, hub, max_shard_bytes=50_000)
        bench.expected()
        yield bench
        bench.close()


def launch(bench: Bench, launcher: list[str], count: int, *arguments: str) -> Run:
    """Run a merge in several processes and wait for its end."""
    command = [sys.executable, *launcher, str(count), "-m", "resmerge_stream", "merge"]
    done = subprocess.run(
        [*command, *arguments, "--json"],
        env={**bench.env(), "ACCELERATE_LOG_LEVEL": "error"},
        cwd=bench.folder,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    return Run(done.returncode, done.stdout, done.stderr)


def process_of_rank(bench: Bench, rank: int) -> int:
    """Return the id of the process that a launcher gave this number, of this Hub's own."""
    mine = b"HF_ENDPOINT=" + bench.hub.endpoint.encode()
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit() or int(folder.name) == os.getpid():
            continue
        try:
            words = (folder / "environ").read_bytes().split(b"\0")
            command = (folder / "cmdline").read_bytes()
        except OSError:
            continue
        if {mine, b"RANK=%d" % rank} <= set(words) and b"resmerge_stream" in command:
            return int(folder.name)
    raise AssertionError(f"no process has number {rank}")


def forget_shards(bench: Bench) -> None:
    """Remove the merged shards from the Hub's storage, so that they have to be sent again."""
    for name, data in bench.expected().items():
        if name.endswith(".safetensors"):
            path = bench.hub._services.objects.path(hashlib.sha256(data).hexdigest())
            path.unlink(missing_ok=True)


@pytest.mark.slow
def test_two_processes_publish_together(bench: Bench) -> None:
    """`accelerate launch`: both stage shards on one branch, one commit shows them, one tells."""
    bench.hub.log.clear()

    done = launch(bench, ACCELERATE, 2, *bench.sources(), "--push-to", "alice/two")

    assert done.code == 0, done.err
    assert bench.published("alice/two") == bench.expected()
    assert bench.history("alice/two") == ["Merge with ResMerge Stream", "initial commit"]
    assert list(bench.hub.repo("alice/two").refs()) == ["refs/heads/main"]
    staging = bench.hub.log.find(method="POST", path="/commit/resmerge", status=200)
    assert len({entry.pid for entry in staging}) == 2
    told = [event["event"] for event in done.events]
    assert (told.count("planned"), told.count("finished")) == (1, 1)
    assert told.count("tensor") == len(done.last["report"]["tensors"])


@pytest.mark.slow
def test_a_killed_process_ends_the_run_and_the_same_command_continues(bench: Bench) -> None:
    """SIGKILL of one of two: the launcher fails, the message names what is missing; one resumes."""
    forget_shards(bench)
    killed: list[int] = []
    ended = threading.Event()
    # What one shard is made of doesn't come before the run has ended: that shard is missing,
    # however fast the others are.
    withheld = max(name for name in bench.expected() if name.endswith(".safetensors"))

    def withhold() -> None:
        bench.hub.faults.add(Hold(until=ended), path=f"/expert2/resolve/.*/{withheld}")

    def kill() -> None:
        killed.append(process_of_rank(bench, 1))
        os.kill(killed[0], signal.SIGKILL)

    # The first such commit starts the staging, after all headers were read; the next stages shards.
    staging = {"method": "POST", "path": "/commit/resmerge", "times": 1, "after": True}
    bench.hub.faults.add(Hook(call=withhold), **staging)
    rule = bench.hub.faults.add(Hook(call=kill), **staging, skip=1)
    stopped = launch(bench, ACCELERATE, 2, *bench.sources(), "--push-to", "alice/killed")
    ended.set()
    bench.hub.faults.clear()

    assert (rule.hits, len(killed)) == (1, 1)
    assert stopped.code != 0
    assert "missing: 'model-0000" in stopped.err, stopped.err
    assert stopped.last["event"] == "stopped"
    assert set(bench.hub.files("alice/killed")) <= {".gitattributes"}

    done = bench.merge("--push-to", "alice/killed")

    assert done.code == 0, done.err
    assert sum(event["resumed"] for event in done.events if event["event"] == "shard") >= 1
    assert bench.published("alice/killed") == bench.expected()


@pytest.mark.slow
def test_three_processes_fill_one_folder(bench: Bench, tmp_path: Path) -> None:
    """`torchrun`, from folders into a folder: the same bytes."""
    out = tmp_path / "out"

    done = launch(bench, TORCHRUN, 3, *bench.folders(), "--out", str(out))

    assert done.code == 0, done.err
    for name, data in bench.expected().items():
        assert (out / name).read_bytes() == data, name


@pytest.mark.slow
def test_what_cannot_be_merged_is_said_once(bench: Bench, tmp_path: Path) -> None:
    """A refused plan: the main process says why, the others nothing."""
    done = launch(bench, TORCHRUN, 2, *bench.folders(), "--out", str(tmp_path), "--dtype", "int3")

    assert done.code != 0
    assert done.err.count("resmerge-stream:") == 1
    assert [event["event"] for event in done.events] == ["refused"]
