"""A simulation of merges that are too large for this machine: ``python -m benchmarks.scale``.

The plan is real (headers of 405B and 671B models on the loopback Hub), and so are the work list,
the pieces, the windows of bytes and the room on the disk. Time is not: bytes go over lines of an
assumed speed, and arithmetic takes the CPU seconds that were measured for an element. Every rate is
printed. Nothing is downloaded, merged or sent, and requests, retries and start-up cost nothing.
"""

import argparse
import heapq
import itertools
import json
import os
import subprocess
import sys
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from resmerge_stream.planning import target as plan_target
from resmerge_stream.planning.plan import Options, Plan, plan_merge
from resmerge_stream.recipe import ModelRef, Recipe
from resmerge_stream.run.pieces import cuts
from resmerge_stream.run.worklist import WorkList
from resmerge_stream.sinks.layout import Shard
from resmerge_stream.sinks.publication import Publication

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
}
# CPU seconds an element: of a matrix's leading triplet for each expert (measured, one core, 16384
# wide: 4.4 ns with σ₁ = 2 σ₂, 62 ns in noise), and of all else for each checkpoint.
SVD = {"gap": 5e-9, "no gap": 62e-9}
_REST = 1.2e-9
# Seconds in which one process commits a shard, while no other one may.
_COMMIT_S = 1.0
# What is busy for this share of the time is what limits a merge.
_BUSY = 0.8


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
        plan = sim.plan
        self.work = WorkList(plan.shards, sim.tickets.__next__, sim.processes)
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
        self.cpu = 0.0

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
            self.busy_cores += 1
            # Cores that have nothing to do when it begins help.
            helped = job.seconds_with(self.cores - self.busy_cores + 1)
            self.sim.at(helped, self.number, ("merged", self.started, job))
            self.cpu += job.seconds
            self.started += 1

    def merged(self, number: int, job: Job) -> None:
        """Write what is merged, in order."""
        self.busy_cores -= 1
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
        self.sending = None

    def count(self, seconds: float) -> None:
        """Note what was under way in the time that passed."""
        self.busy["arithmetic"] += seconds * (self.busy_cores > 0)


class Simulation:
    """A merge in simulated time."""

    def __init__(
        self, plan: Plan, processes: int, machine: Machine, *, svd: float, own: bool
    ) -> None:
        self.plan, self.processes, self.svd = plan, processes, svd
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

    def jobs(self, shard: Shard) -> Iterator[Job]:
        """Yield the pieces of a shard, as the engine reads them."""
        plan = self.plan
        for spec in shard.tensors:
            tensor = plan.tensors[spec.name]
            sources = plan.sources_of(tensor)
            for start, stop, part, is_last in cuts(tensor):
                stored = sum(source.read_cost(spec.name, start, stop) for source in sources)
                read = 0 if part else stored
                elements = stored / 2 / len(sources) / (1 if part is None else tensor.parts)
                heads: tuple[float, ...] = ()
                if tensor.rule is not None and tensor.rule.needs_matrix:
                    heads = (elements * self.svd,) * (len(sources) - 1)
                yield Job(
                    shard,
                    read,
                    2 * elements,
                    plan.working_bytes_of(tensor),
                    heads,
                    elements * len(sources) * _REST,
                    tensor.resident,
                    is_last and spec is shard.tensors[-1],
                )

    def at(self, seconds: float, who: int, what: tuple) -> None:
        """Have something happen later."""
        heapq.heappush(self._events, (self.now + seconds, next(self._number), who, what))

    def run(self) -> None:
        """Let time pass until nothing is left to happen."""
        for process in self.all:
            process.go_on()
        while True:
            coming = [(*found, line) for line in self._lines if (found := line.next())]
            line = min(coming, key=lambda c: c[0], default=None)
            timed = self._events[0] if self._events else None
            if line is None and timed is None:
                return
            is_line = line is not None and (timed is None or line[0] <= timed[0])
            self._pass(line[0] if is_line else timed[0])  # type: ignore[index]
            if is_line:
                assert line is not None
                process = self.all[line[1]]
                del line[2].left[line[1]]
                process.read() if line[2] is process.down else process.sent()
            else:
                _, _, who, (what, *details) = heapq.heappop(self._events)
                process = self.all[who]
                getattr(process, what)(*details)
            # Work that was waited for by this process only: the others' share is their own.
            process.go_on()

    def _pass(self, moment: float) -> None:
        for process in self.all:
            process.count(moment - self.now)
        self.now = moment
        for line in self._lines:
            line.advance(moment)


def one(processes: int, kind: str, spectrum: str) -> dict:
    """Simulate one merge with the plan of a Hub that this process is pointed to."""
    machine, own = MACHINES[kind], kind == "own"
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
    plan = plan.accepted()
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


def main() -> None:
    """Print the rates, and a table of wall time, memory, disk, and what limits it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--dir", type=Path, default=scratch_folder("scale"))
    parser.add_argument("--only", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only:
        print(json.dumps(one(int(args.only[0]), args.only[1], args.only[2])))
        return
    print("SIMULATED from real plans; assumed:")
    for kind, m in MACHINES.items():
        print(
            f"  {kind} machine: {m.cores} cores, {m.memory / 1e9:.0f} GB, "
            f"{m.down / 1e6:.0f} MB/s down, {m.up / 1e6:.0f} MB/s up"
        )
    print(f"  CPU seconds an element: triplet {SVD}, rest {_REST}; commit {_COMMIT_S} s")
    rows = []
    for name, shapes in giants().items():
        with header_hub(args.dir, shapes) as made:
            kinds = [("own", "gap"), ("own", "no gap"), ("shared", "gap")]
            for (kind, spectrum), processes in itertools.product(kinds, (1, 4, 16)):
                env = {**made.env(), "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": str(processes)}
                if kind == "own":
                    env["LOCAL_WORLD_SIZE"] = "1"
                words = [str(processes), kind, spectrum]
                done = subprocess.run(
                    [sys.executable, "-m", "benchmarks.scale", "--only", *words],
                    env={**os.environ, **env}, capture_output=True, text=True, check=False,
                )  # fmt: skip
                if done.returncode:
                    raise RuntimeError(done.stderr[-2000:])
                rows.append(_row(name, kind, spectrum, processes, json.loads(done.stdout)))
                print("\t".join(rows[-1]), file=sys.stderr)
    head = ("model", "machines", "spectrum", "processes", "wall", "memory at most", "disk at most",
            "line down busy", "line up busy", "merging", "cores busy", "limited by")  # fmt: skip
    table(head, rows)


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
        f"{int(found['hours'])} h {found['hours'] % 1 * 60:02.0f} min",
        f"{found['memory'] / 1e9:.0f} GB",
        f"{found['disk'] / 1e9:.0f} GB",
        *(f"{busy[key]:.0%}" for key in ("download", "upload", "arithmetic", "cores")),
        limit,
    )


if __name__ == "__main__":
    main()
