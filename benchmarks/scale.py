"""A simulation of merges that are too large for this machine: ``python -m benchmarks.scale NAME``.

one    processes on one machine and on several (405B and 671B)
fleet  1 to 64 machines: which part the others wait for, with machines that start late and that are
       lost, drawn at random (70B, 405B, 1T; --models, --machines, --seed)

The plan is real (headers of such models on the loopback Hub), and so are the work list, the pieces,
the windows of bytes and the room on the disk. Time is not: bytes go over lines of an assumed speed,
and arithmetic takes the CPU seconds that were measured for an element. Every rate is printed.
Nothing is downloaded, merged or sent, and requests and retries cost nothing.
"""

import argparse
import heapq
import itertools
import json
import os
import random
import statistics
import subprocess
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from resmerge_stream.planning import target as plan_target
from resmerge_stream.planning.costs import HUB_RATE
from resmerge_stream.planning.machines import START_SECONDS
from resmerge_stream.planning.plan import Options, Plan, plan_merge
from resmerge_stream.recipe import ModelRef, Recipe
from resmerge_stream.run.group import SILENT_S
from resmerge_stream.run.pieces import cuts
from resmerge_stream.run.processes import WorkList
from resmerge_stream.sinks.layout import Shard
from resmerge_stream.sinks.publication import Publication
from tests.support.hub_runs import Bench

from .hub import giants, header_hub, table
from .measure import scratch_folder


@dataclass(frozen=True, slots=True)
class Machine:
    """What is assumed of a machine: cores, bytes of memory, bytes a second down and up."""

    cores: int
    memory: float
    down: float
    up: float


MACHINES = {
    "own": Machine(8, 32e9, 500e6, 250e6),
    "shared": Machine(64, 512e9, 1250e6, 1250e6),
    "slow line": Machine(8, 32e9, HUB_RATE, HUB_RATE),
}
# CPU seconds an element: of a matrix's leading triplet for each expert (measured, one core, 16384
# wide: 4.4 ns with σ₁ = 2 σ₂, 62 ns in noise), and of all else for each checkpoint.
SVD = {"gap": 5e-9, "no gap": 62e-9}
_REST = 1.2e-9
# Seconds in which one process commits a shard, while no other one may.
_COMMIT_S = 1.0
# What is busy for this share of the time is what limits a merge.
_BUSY = 0.8
# Of a fleet, assumed: a machine starts after a third of the time that a Job is estimated at to
# three times of it, and is lost once in so many hours.
_LEAST_START, _MOST_START = START_SECONDS / 3, START_SECONDS * 3
_HOURS_UNTIL_LOST = 200.0
_KINDS = (("own", "gap"), ("own", "no gap"), ("slow line", "gap"))
_DRAWS = 5


@dataclass(slots=True)
class Job:
    """One piece: bytes to read and to write, memory, and one core's seconds to merge it.

    Attributes:
        heads: seconds of each expert's head; found side by side where they all lie in memory.
        blocks: seconds of everything else, which is shared out by row blocks.
    """

    shard: Shard
    read: int
    written: float
    memory: int
    heads: tuple[float, ...]
    blocks: float
    is_resident: bool
    is_last: bool

    @property
    def seconds(self) -> float:
        """Of one core alone."""
        return self.blocks + sum(self.heads)

    def seconds_with(self, cores: int) -> float:
        """Return the seconds that it takes with so many cores."""
        if not self.heads:
            return self.blocks  # merged by rows, by one core
        turns = -(-len(self.heads) // cores) if self.is_resident else len(self.heads)
        return self.blocks / cores + max(self.heads) * turns


@dataclass(slots=True)
class Line:
    """A direction of a machine's line: what goes over it at the same time shares it."""

    rate: float
    left: dict[int, float] = field(default_factory=dict)
    at: float = 0.0
    busy: float = 0.0

    def advance(self, now: float) -> None:
        """Let bytes pass until now."""
        if self.left:
            self.busy += now - self.at
            passed = (now - self.at) * self.rate / len(self.left)
            for who in self.left:
                self.left[who] -= passed
        self.at = now

    def next(self) -> tuple[float, int] | None:
        """Return when the next one is through, and whose it is."""
        if not self.left:
            return None
        who = min(self.left, key=self.left.__getitem__)
        return self.at + max(self.left[who], 0.0) * len(self.left) / self.rate, who


class Process:
    """One process: its work list, read-ahead window, cores, disk and uploads."""

    def __init__(
        self, number: int, sim: "Simulation", cores: int, lines: tuple[Line, Line]
    ) -> None:
        self.number, self.sim, self.cores = number, sim, cores
        self.down, self.up = lines
        self.work = WorkList(sim.shards, sim.tickets.__next__, sim.processes)
        self.order = self._order()
        self.own = iter(self.work)
        self.shard: Shard | None = None
        self.held = self.working = self.busy_cores = 0
        self.next_read: Job | None = None
        self.ready: deque[Job] = deque()
        self.results: dict[int, Job] = {}
        self.started = self.written = 0
        self.on_disk = self.peak_disk = 0.0
        self.to_send: deque[Shard] = deque()
        self.sending: Shard | None = None
        self.busy = dict.fromkeys(("arithmetic",), 0.0)
        self.cpu = self.busy_since = 0.0

    def _order(self) -> Iterator[Job | None]:
        for shard in self.work.ahead():
            if shard is None:
                yield None
            else:
                yield from self.sim.jobs(shard)

    def go_on(self) -> None:
        """Start whatever may be started now."""
        self._read()
        self._merge()
        self._send()

    def _read(self) -> None:
        window = self.sim.plan.read_ahead_bytes
        if self.number in self.down.left:
            return
        if self.next_read is None:
            self.next_read = next(self.order, None)
        job = self.next_read
        if job is not None and (self.held == 0 or self.held + job.read <= window):
            self.held += job.read
            self.down.left[self.number] = job.read

    def read(self) -> None:
        """Take a piece that has arrived."""
        assert self.next_read is not None
        self.ready.append(self.next_read)
        self.next_read = None

    def _merge(self) -> None:
        limit = self.sim.plan.working_bytes
        while self.ready and self.busy_cores < self.cores:
            job = self.ready[0]
            if self.working and self.working + job.memory > limit:
                return
            if self.shard is None or job.shard is not self.shard:
                # As in the engine: a shard begins when the one before is complete, and has room.
                if self.shard is not None and self.written < self.started:
                    return
                largest = max(shard.nbytes for shard in self.sim.plan.shards)
                if self.on_disk + job.shard.nbytes > 2 * largest:
                    return
                self.shard = next(self.own)
                self.on_disk += job.shard.nbytes
                self.peak_disk = max(self.peak_disk, self.on_disk)
            self.ready.popleft()
            self.working += job.memory
            if not self.busy_cores:
                self.busy_since = self.sim.now
            self.busy_cores += 1
            # Cores that have nothing to do when it begins help.
            helped = job.seconds_with(self.cores - self.busy_cores + 1)
            self.sim.at(helped, self.number, ("merged", self.started, job))
            self.cpu += job.seconds
            self.started += 1

    def merged(self, number: int, job: Job) -> None:
        """Write what is merged, in order."""
        self.busy_cores -= 1
        if not self.busy_cores:
            self.busy["arithmetic"] += self.sim.now - self.busy_since
        self.results[number] = job
        while self.written in self.results:
            done = self.results.pop(self.written)
            self.working -= done.memory
            self.held -= done.read
            self.written += 1
            if done.is_last:
                self.to_send.append(done.shard)

    def _send(self) -> None:
        if self.sending is None and self.to_send:
            self.sending = self.to_send.popleft()
            self.up.left[self.number] = self.sending.nbytes

    def sent(self) -> None:
        """Commit a shard, when it is this process's turn."""
        sim = self.sim
        sim.turn_free = max(sim.turn_free, sim.now) + _COMMIT_S
        sim.at(sim.turn_free - sim.now, self.number, ("committed",))

    def committed(self) -> None:
        """Free the disk."""
        assert self.sending is not None
        self.on_disk -= self.sending.nbytes
        self.sim.done.add(self.sending.name)
        self.sending = None


class Simulation:
    """A merge in simulated time.

    Args:
        plan: of the merge.
        processes: how many there are.
        machine: each, or all of them together.
        svd: CPU seconds of an element's leading triplet.
        own: whether each process has a machine of its own.
        shards: those that are left to merge; all when None.
        pieces: of shards that another simulation of the plan has looked at.

    Attributes:
        done: the shards that are committed.
    """

    def __init__(
        self,
        plan: Plan,
        processes: int,
        machine: Machine,
        *,
        svd: float,
        own: bool,
        shards: Sequence[Shard] | None = None,
        pieces: dict[str, list[Job]] | None = None,
    ) -> None:
        self.pieces = {} if pieces is None else pieces
        self.plan, self.processes, self.svd = plan, processes, svd
        self.shards = plan.shards if shards is None else shards
        self.done: set[str] = set()
        self.tickets = itertools.count()
        self.now = self.turn_free = 0.0
        self._events: list[tuple[float, int, int, tuple]] = []
        self._number = itertools.count()
        cores = machine.cores if own else machine.cores // processes
        shared = (Line(machine.down), Line(machine.up))
        pairs = [
            (Line(machine.down), Line(machine.up)) if own else shared for _ in range(processes)
        ]
        self.all = [Process(n, self, cores, lines) for n, lines in enumerate(pairs)]
        self._lines = list({id(line): line for pair in pairs for line in pair}.values())

    def jobs(self, shard: Shard) -> list[Job]:
        """Return the pieces of a shard, as the engine reads them."""
        if shard.name not in self.pieces:
            self.pieces[shard.name] = list(self._jobs(shard))
        return self.pieces[shard.name]

    def _jobs(self, shard: Shard) -> Iterator[Job]:
        plan = self.plan
        for spec in shard.tensors:
            tensor = plan.tensors[spec.name]
            sources = tensor.sources
            for rows, part, is_last in cuts(tensor):
                stored = sum(source.read_cost(spec.name, rows) for source in sources)
                read = 0 if part else stored
                elements = stored / 2 / len(sources) / (1 if part is None else tensor.parts)
                heads: tuple[float, ...] = ()
                if tensor.is_decomposed:
                    heads = (elements * self.svd,) * (len(sources) - 1)
                yield Job(
                    shard,
                    read,
                    2 * elements,
                    tensor.working_bytes,
                    heads,
                    elements * len(sources) * _REST,
                    tensor.resident,
                    is_last and spec is shard.tensors[-1],
                )

    def at(self, seconds: float, who: int, what: tuple) -> None:
        """Have something happen later."""
        heapq.heappush(self._events, (self.now + seconds, next(self._number), who, what))

    def run(self, until: float = float("inf")) -> None:
        """Let time pass until nothing is left to happen, or until a moment."""
        due: dict[int, tuple[float, int, Line]] = {}

        def go_on(process: Process) -> None:
            # Nobody else's part changes: what comes next is looked at again on its lines alone.
            process.go_on()
            for line in (process.down, process.up):
                if (found := line.next()) is not None:
                    due[id(line)] = (*found, line)
                else:
                    due.pop(id(line), None)

        for process in self.all:
            go_on(process)
        while True:
            line = min(due.values(), key=lambda one: one[0], default=None)
            timed = self._events[0] if self._events else None
            if line is None and timed is None:
                break
            is_line = line is not None and (timed is None or line[0] <= timed[0])
            moment: float = line[0] if is_line else timed[0]  # type: ignore[index]
            if moment > until:
                self.now = until
                break
            self.now = moment
            if is_line:
                assert line is not None
                process = self.all[line[1]]
            else:
                _, _, who, (what, *details) = heapq.heappop(self._events)
                process = self.all[who]
            process.down.advance(moment)
            process.up.advance(moment)
            if is_line:
                assert line is not None
                del line[2].left[line[1]]
                process.read() if line[2] is process.down else process.sent()
            else:
                getattr(process, what)(*details)
            go_on(process)
        for one in self._lines:
            one.advance(self.now)


def plan_of(machine: Machine) -> Plan:
    """Return the plan of a merge on the Hub that this process is pointed to."""
    # The machine that is simulated has the disk that is needed, whatever this one has.
    plan_target.free_disk = lambda folder: 1 << 50
    recipe = Recipe(
        ModelRef("alice/base"),
        (ModelRef("alice/expert0"), ModelRef("alice/expert1")),
        "resmerge",
        {},
    )
    plan = plan_merge(
        recipe,
        Options(memory_budget=int(0.8 * machine.memory)),
        publication=Publication(repo_id="alice/merged"),
    )
    return plan.accepted()


def one(processes: int, kind: str, spectrum: str) -> dict:
    """Simulate one merge with the plan of a Hub that this process is pointed to."""
    machine, own = MACHINES[kind], kind == "own"
    plan = plan_of(machine)
    sim = Simulation(plan, processes, machine, svd=SVD[spectrum], own=own)
    sim.run()
    busy = {key: sum(p.busy[key] for p in sim.all) / processes / sim.now for key in sim.all[0].busy}
    busy["cores"] = sum(p.cpu / p.cores for p in sim.all) / processes / sim.now
    busy["download"] = sum(p.down.busy for p in sim.all) / processes / sim.now
    busy["upload"] = sum(p.up.busy for p in sim.all) / processes / sim.now
    here = 1 if own else processes
    return {
        "hours": sim.now / 3600,
        "busy": busy,
        "memory": here * plan.peak_memory_bytes,
        "disk": max(p.peak_disk for p in sim.all) * here,
        "shards": len(plan.shards),
    }


def fleet(counts: Sequence[int], seed: int) -> list[dict]:
    """Simulate merges by some machines, undisturbed and with what may happen to them.

    Args:
        counts: how many machines, each with a line of its own.
        seed: of the starts and losses.
    """
    plan, found = plan_of(MACHINES["own"]), []
    for kind, spectrum in _KINDS:
        machine, pieces = MACHINES[kind], dict[str, list[Job]]()
        for machines in counts:
            how: dict[str, Any] = {"svd": SVD[spectrum], "own": True, "pieces": pieces}
            sim = Simulation(plan, machines, machine, **how)
            sim.run()
            draw = random.Random(f"{seed} {machines}")
            drawn = [disturbed(sim, machine, draw) for _ in range(_DRAWS)]
            found.append(
                {
                    "kind": kind,
                    "spectrum": spectrum,
                    "machines": machines,
                    "shards": len(plan.shards),
                    "seconds": sim.now,
                    "bounds": bounds(plan, sim, machine),
                    "disturbed": statistics.median(seconds for seconds, _ in drawn),
                    "lost": statistics.fmean(lost for _, lost in drawn),
                }
            )
    return found


def disturbed(like: Simulation, machine: Machine, draw: random.Random) -> tuple[float, int]:
    """Return the seconds of a merge by machines that start late and may be lost, and how many were.

    As the engine does it: a run begins when the last machine is there. When one is lost, the others
    notice it after a while and all end; then all start again, and go on from the committed shards.
    """
    now, lost, left, machines = 0.0, 0, list(like.plan.shards), like.processes
    while left:
        now += max(draw.uniform(_LEAST_START, _MOST_START) for _ in range(machines))
        until = draw.expovariate(machines / (3600 * _HOURS_UNTIL_LOST))
        if not lost and until >= like.now:
            return now + like.now, 0
        how: dict[str, Any] = {"svd": like.svd, "own": True, "shards": left, "pieces": like.pieces}
        sim = Simulation(like.plan, machines, machine, **how)
        sim.run(until)
        left = [shard for shard in left if shard.name not in sim.done]
        now += sim.now
        if left:
            now, lost = now + SILENT_S, lost + 1
    return now, lost


def bounds(plan: Plan, sim: Simulation, machine: Machine) -> dict[str, float]:
    """Return the seconds that a merge takes at least, by what each machine and the Hub must do."""
    shards = plan.shards
    jobs = [job for shard in shards for job in sim.jobs(shard)]
    spread = {
        "line down": sum(job.read for job in jobs) / machine.down,
        "line up": sum(shard.nbytes for shard in plan.shards) / machine.up,
        "cores": sum(job.seconds for job in jobs) / machine.cores,
        # A matrix holds its memory as long as it is merged.
        "memory": sum(job.memory * job.seconds_with(machine.cores) for job in jobs)
        / plan.working_bytes,
    }
    largest = max(jobs, key=lambda job: job.read / machine.down + job.seconds_with(machine.cores))
    busiest, most = -(-len(shards) // sim.processes), max(spread.values())
    found = {name: seconds / sim.processes for name, seconds in spread.items()}
    if busiest * sim.processes > 1.1 * len(shards):
        found["whole shards"] = most * busiest / len(shards)
    found["commits"] = len(shards) * _COMMIT_S
    found["largest tensor"] = largest.read / machine.down + largest.seconds_with(machine.cores)
    return found


def main() -> None:
    """Print the rates and a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("name", choices=("one", "fleet"), nargs="?", default="one")
    parser.add_argument("--dir", type=Path, default=scratch_folder("scale"))
    parser.add_argument("--seed", type=int, default=0, help="fleet: of starts and losses (0)")
    parser.add_argument("--models", default="70B,405B,1T", help="fleet: of these (70B,405B,1T)")
    parser.add_argument("--machines", default="1,4,16,64", help="fleet: how many (1,4,16,64)")
    parser.add_argument("--only", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only and args.name == "one":
        print(json.dumps(one(int(args.only[0]), *args.only[1:])))
        return
    if args.only:
        print(json.dumps(fleet([int(count) for count in args.machines.split(",")], args.seed)))
        return
    print("SIMULATED from real plans; assumed:")
    kinds = ("own", "shared") if args.name == "one" else ("own", "slow line")
    for kind in kinds:
        m = MACHINES[kind]
        print(
            f"  {kind} machine: {m.cores} cores, {m.memory / 1e9:.0f} GB, "
            f"{m.down / 1e6:.0f} MB/s down, {m.up / 1e6:.0f} MB/s up"
        )
    print(f"  CPU seconds an element: triplet {SVD}, rest {_REST}; commit {_COMMIT_S} s")
    (print_one if args.name == "one" else print_fleet)(args)


def print_one(args: argparse.Namespace) -> None:
    """Print a table of wall time, memory, disk, and what limits it."""
    rows = []
    for name in ("405B dense", "671B experts"):
        with header_hub(args.dir, giants()[name]) as made:
            kinds = [("own", "gap"), ("own", "no gap"), ("shared", "gap")]
            for (kind, spectrum), processes in itertools.product(kinds, (1, 4, 16)):
                local = "1" if kind == "own" else str(processes)
                words = [str(processes), kind, spectrum]
                found = _apart(made, ["one", "--only", *words], local)
                rows.append(_row(name, kind, spectrum, processes, found))
                print("\t".join(rows[-1]), file=sys.stderr)
    head = ("model", "machines", "spectrum", "processes", "wall", "memory at most", "disk at most",
            "line down busy", "line up busy", "merging", "cores busy", "limited by")  # fmt: skip
    table(head, rows)


def print_fleet(args: argparse.Namespace) -> None:
    """Print a table of wall time by machines and which part they wait for, and one of limits."""
    print(
        f"  a machine starts after {_LEAST_START:.0f} to {_MOST_START:.0f} s, is lost once in "
        f"{_HOURS_UNTIL_LOST:.0f} h, and missed after {SILENT_S:.0f} s; median of {_DRAWS} draws"
    )
    chosen, rows, limits = args.models.split(","), [], []
    for name in (name for name in giants() if name.split()[0] in chosen):
        with header_hub(args.dir, giants()[name]) as made:
            words = ["fleet", "--machines", args.machines, "--seed", str(args.seed), "--only", "1"]
            found = _apart(made, words, "1")
        for row in found:
            line = "500 / 250 MB/s" if row["kind"] == "own" else "50 / 50 MB/s"
            named = {**row["bounds"], "starts and losses": row["disturbed"] - row["seconds"]}
            bound = max(named, key=named.__getitem__)
            like = (row["kind"], row["spectrum"])
            first = next(one for one in found if (one["kind"], one["spectrum"]) == like)
            rows.append(
                (
                    name,
                    line,
                    row["spectrum"],
                    f"{row['machines']}",
                    _time(row["seconds"]),
                    f"{first['seconds'] / row['seconds']:.1f}",
                    _time(row["disturbed"]),
                    f"{row['lost']:.1f}",
                    f"{row['machines'] * row['disturbed'] / 3600:.1f} h",
                    f"{bound} ({named[bound] / row['disturbed']:.0%})",
                )
            )
            if row is first:
                fixed = {key: row["bounds"][key] for key in ("commits", "largest tensor")}
                shared = max(v for key, v in row["bounds"].items() if key not in fixed)
                from_ = [f"{row['machines'] * shared / seconds:.0f}" for seconds in fixed.values()]
                limits.append((name, line, row["spectrum"], f"{row['shards']}", *from_))
    head = ("model", "line", "spectrum", "machines", "wall", "times as fast",
            "wall with starts and losses", "lost", "machine time", "bound by")  # fmt: skip
    table(head, rows)
    print()
    table(
        ("model", "line", "spectrum", "shards", "commits bind from", "one tensor binds from"),
        limits,
    )


def _apart(made: Bench, words: list[str], local: str) -> Any:
    """Return what a process of this benchmark that is pointed to a Hub finds."""
    env = {**made.env(), "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": local}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.scale", *words],
        env={**os.environ, **env}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return json.loads(done.stdout)


def _time(seconds: float) -> str:
    """Return hours and minutes."""
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02d} min"


def _row(name: str, kind: str, spectrum: str, processes: int, found: dict) -> tuple[str, ...]:
    busy = found["busy"]
    # Bytes are held until their tensor is merged: a large one keeps the next from being read.
    limit = "memory: one large matrix at a time"
    for key, name_of in (("download", "line down"), ("upload", "line up"), ("cores", "cores")):
        if busy[key] >= _BUSY:
            limit = name_of
    return (
        name,
        f"{processes} of their own" if kind == "own" else "one, shared",
        spectrum,
        f"{processes}",
        _time(3600 * found["hours"]),
        f"{found['memory'] / 1e9:.0f} GB",
        f"{found['disk'] / 1e9:.0f} GB",
        *(f"{busy[key]:.0%}" for key in ("download", "upload", "arithmetic", "cores")),
        limit,
    )


if __name__ == "__main__":
    main()
