"""Several processes or Jobs on one merge (S7, E4): ``python -m benchmarks.processes NAME``.

s7  wall time of a throttled Hub-to-Hub merge by one and by two processes
fleet  wall time of a throttled Hub-to-Hub merge as 1, 2 and 4 Jobs, each with a line of its own
e4  hashes of a merge by one, two and three processes, from folders and from the Hub, killed and not

Each prints a table. The options are those of `benchmarks.hub`.
"""

import argparse
import hashlib
import itertools
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from tests.run.test_launchers import ACCELERATE, TORCHRUN, process_of_rank
from tests.support.hub_jobs import run_jobs
from tests.support.hub_runs import Bench

from .hub import bench, table
from .measure import scratch_folder

_LATENCY_S = 0.05
# How much faster a merge should be as so many Jobs.
_TARGETS = {2: 1.85, 4: 3.5}


def command(processes: int, *arguments: str, launcher: Sequence[str] = ACCELERATE) -> list[str]:
    """Return the command of a merge by some processes."""
    launcher = [] if processes == 1 else [*launcher, str(processes)]
    return [sys.executable, *launcher, "-m", "resmerge_stream", "merge", *arguments]


def run(made: Bench, words: Sequence[str], *, home: str) -> float:
    """Run a command to its end and return its wall time.

    Raises:
        RuntimeError: it failed.
    """
    env = {**made.env(home=home), "ACCELERATE_LOG_LEVEL": "error"}
    started = time.perf_counter()
    done = subprocess.run(words, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return time.perf_counter() - started


def s7(args: argparse.Namespace) -> None:
    """Print the wall time of one and of two processes, each throttled alike, in turn."""
    seconds: dict[int, list[float]] = {1: [], 2: []}
    with bench(args) as made:
        limits = made.hub.limits
        limits.down = limits.up = args.rate * 1e6
        limits.latency, limits.per = _LATENCY_S, "process"
        for number in range(args.times):
            for processes in seconds:
                target = f"alice/s7-{processes}-{number}"
                launcher = TORCHRUN if args.torchrun else ACCELERATE
                options = (*made.sources(), "--push-to", target)
                words = command(processes, *options, launcher=launcher)
                seconds[processes].append(run(made, words, home=f"home{processes}-{number}"))
                _forget(made, target)
    one, two = (statistics.median(values) for values in seconds.values())
    rows = [
        (
            f"{processes}",
            f"{statistics.median(values):.1f} s",
            f"{min(values):.1f}–{max(values):.1f}",
        )
        for processes, values in seconds.items()
    ]
    table(("processes", "wall (median)", "range"), rows)
    print(f"one ÷ two: {one / two:.2f} (target 1.7)")


def _forget(made: Bench, target: str) -> None:
    """Have the Hub forget the merged shards: the next run has to send them again."""
    for name in made.hub.files(target):
        if name.endswith(".safetensors"):
            digest = hashlib.sha256(made.hub.read(target, name)).hexdigest()
            made.hub._services.objects.path(digest).unlink(missing_ok=True)


def fleet(args: argparse.Namespace) -> None:
    """Print the wall time of a merge as one Job and as several, each throttled alike, in turn."""
    counts = [int(count) for count in args.machines.split(",")]
    walls: dict[int, list[float]] = {count: [] for count in counts}
    merging: dict[int, list[float]] = {count: [] for count in counts}
    expected: dict[str, bytes] = {}
    with bench(args) as made:
        limits = made.hub.limits
        limits.down = limits.up = args.rate * 1e6
        limits.latency, limits.per = _LATENCY_S, "process"
        run_jobs(made)
        for number, count in itertools.product(range(args.times), counts):
            target = f"alice/fleet-{count}-{number}"
            words = ["submit", *made.sources(), "--push-to", target, "--machines", str(count)]
            started = time.perf_counter()
            done = made.fresh([*words, "--yes"], home=f"home{count}-{number}")
            if done.code:
                raise RuntimeError(done.out[-2000:] + done.err[-2000:])
            walls[count].append(time.perf_counter() - started)
            (seconds,) = re.findall(r"merged into .* in (\d+\.\d) s, ", done.out)
            merging[count].append(float(seconds))
            expected = expected or made.published(target)
            if made.published(target) != expected:
                raise RuntimeError(f"{target} has other bytes")
            _forget(made, target)
    one = statistics.median(merging[counts[0]]), statistics.median(walls[counts[0]])
    rows = []
    for count in counts:
        merge, wall = statistics.median(merging[count]), statistics.median(walls[count])
        rows.append(
            (
                f"{count}",
                f"{merge:.1f} s",
                f"{one[0] / merge:.2f}",
                f"{wall:.1f} s",
                f"{one[1] / wall:.2f}",
            )
        )
    head = ("Jobs", "merging (median)", "times as fast", "with starts", "times as fast")
    table(head, rows)
    print(f"targets of merging: {_TARGETS}")


def e4(args: argparse.Namespace) -> None:
    """Print whether weights, index and config are the same, however many processes made them."""
    rows = []
    with bench(args) as made:
        expected = made.expected()
        for processes in (1, 2, 3):
            out = made.folder / f"by-{processes}"
            run(made, command(processes, *made.folders(), "--out", str(out)), home="home")
            same = all((out / name).read_bytes() == data for name, data in expected.items())
            rows.append((f"{processes}", "folders to a folder", "equal" if same else "DIFFERENT"))
            target = f"alice/by-{processes}"
            run(made, command(processes, *made.sources(), "--push-to", target), home="home")
            same = made.published(target) == expected
            rows.append((f"{processes}", "Hub to Hub", "equal" if same else "DIFFERENT"))
        for first, then in ((2, 3), (3, 1), (1, 2)):
            rows.append((f"{first}, then {then}", "killed between", _killed(made, first, then)))
    table(("processes", "merge", "bytes"), rows)


def _killed(made: Bench, first: int, then: int) -> str:
    """Kill one process after a shard, continue with another number of processes, compare."""
    out = made.folder / f"killed-{first}-{then}"
    process = subprocess.Popen(
        command(first, *made.folders(), "--out", str(out)),
        env=made.env(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while process.poll() is None and not list(out.glob("*.part")):
        time.sleep(0.005)
    if process.poll() is None:
        os.kill(process.pid if first == 1 else process_of_rank(made, first - 1), signal.SIGKILL)
    process.wait()
    was = "killed" if process.returncode else "NOT KILLED"
    run(made, command(then, *made.folders(), "--out", str(out)), home="home")
    same = all((out / name).read_bytes() == data for name, data in made.expected().items())
    shutil.rmtree(out)
    return f"{was}, {'equal' if same else 'DIFFERENT'}"


def main() -> None:
    """Run one benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("name", choices=("s7", "fleet", "e4"))
    parser.add_argument("--dir", type=Path, default=scratch_folder("processes"))
    parser.add_argument("--hidden", type=int, default=64, help="width of the model (64)")
    parser.add_argument("--layers", type=int, default=4, help="layers of the model (4)")
    parser.add_argument("--shard", type=float, default=0.05, help="megabytes of a shard (0.05)")
    parser.add_argument("--rate", type=float, default=40, help="s7, fleet: MB/s each way (40)")
    parser.add_argument("--machines", default="1,2,4", help="fleet: how many Jobs (1,2,4)")
    parser.add_argument("--times", type=int, default=3, help="s7, fleet: runs of each (3)")
    parser.add_argument("--torchrun", action="store_true", help="s7: instead of accelerate")
    args = parser.parse_args()
    {"s7": s7, "fleet": fleet, "e4": e4}[args.name](args)


if __name__ == "__main__":
    main()
