"""The loop over shards: read once, merged by every branch, cast, written; a generator of events.

A branch is a plan, what merges it, and where it goes. A merge has one. A comparison has one for
each method, over the same sources: they share what is read, the task vectors and the heads.
"""

import contextlib
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from ..errors import NonFiniteError, Remedy, StoppedError, listed
from ..maths.rounding import Kept
from ..memory import WRITE_QUEUE_BYTES
from ..pipes import WriteBehind, meanwhile
from ..planning.plan import Plan, PlannedTensor
from ..report.build import build_report
from ..report.rows import Rows
from ..sinks import Sink
from ..sinks.layout import Shard
from ..version import __version__
from .events import Event, Progressed, ShardFinished, TensorMerged
from .merging import Carried, Decided, Merged, MergedRows, Merger, Prepared
from .pieces import Assembly
from .pipeline import block_threads, blocks_ahead, worked_ahead, workers
from .processes import Processes, WorkList
from .progress import Progress
from .reading import READ_AHEAD_BYTES, Shared, reading_ahead_of, shared_order, shared_reads

# How long nothing may be heard of a run.
_TICK_S = 1.0
# How often shards that were changed at the target are made again.
_RESENT_TRIES = 3


class Watch(Protocol):
    """Sees the updates of all branches of a shard side by side."""

    def products(self, updates: Mapping[str, Tensor], stack: Tensor) -> Tensor | None:
        """Return what is kept of a row block's ΔW, by label, and Δ; safe in any thread."""
        ...

    def add(self, products: Tensor | None, experts: Sequence[int]) -> None:
        """Take that of a row block in file order, and which experts take part there."""
        ...

    def to_dict(self) -> dict[str, Any]:
        """Return it all as plain data, for the journal of the shard."""
        ...


@dataclass(slots=True)
class Branch:
    """One plan of a run, and where it goes.

    Attributes:
        plan, sink, merger: its own.
        label: stands before its tensors and shards in events; empty where there is one branch.
        kept: the journal's rows of shards that an earlier run made, by name.
        rows: the report's row of each tensor that is merged.
        files: name, size and sha256 of each finished shard.
        seen: what a `Watch` saw in each.
        seconds: that watched threads spent on it, added up.
    """

    plan: Plan
    sink: Sink
    merger: Merger
    label: str = ""
    kept: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    rows: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    seen: dict[str, Mapping[str, Any] | None] = field(default_factory=dict)
    seconds: float = 0.0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @contextlib.contextmanager
    def timed(self) -> Iterator[None]:
        """Add what a thread spends on it."""
        started = time.monotonic()
        yield
        with self._lock:
            self.seconds += time.monotonic() - started


@dataclass(frozen=True, slots=True)
class Run:
    """Branches that are merged together.

    Attributes:
        branches: over the same sources, with the same shards.
        progress: of all.
        watch: makes what looks at the branches of a shard, given their labels; None: nobody does,
            so that each branch merges a piece as soon as it can.
    """

    branches: Sequence[Branch]
    progress: Progress
    watch: Callable[[list[str]], Watch] | None = None

    @property
    def plan(self) -> Plan:
        """The first branch's; sources, shards and memory are the same in all."""
        return self.branches[0].plan

    def missing(self, shard: Shard) -> dict[str, Branch]:
        """Return the branches for which no earlier run made a shard, by label."""
        return {one.label: one for one in self.branches if shard.name not in one.kept}

    @property
    def unfinished(self) -> list[str]:
        """The shards that nobody has finished yet, by name."""
        made = [branch.files for branch in self.branches]
        return [s.name for s in self.plan.shards if not all(s.name in files for files in made)]

    def waiting(self, call: Callable[[], object]) -> Iterator[Event]:
        """Do what may take long; yield how far the run is until it is done."""
        return meanwhile(call, _TICK_S, lambda: Progressed(**self.progress.now()))


def merge_shards(run: Run, processes: Processes) -> Iterator[Event]:
    """Merge what is left, this process its part of it; end when it is where it has to be.

    Raises:
        NonFiniteError: a weight is NaN or infinite, or overflows the output dtype.
        SourceChangedError: a source changed while it was read.
        StoppedError: disk, network or permission.
    """
    first, progress = run.branches[0], run.progress
    for branch in run.branches:
        branch.kept = processes.gathered("kept", branch.sink.finished_shards())
    work = processes.work(run.plan, {s.name for s in run.plan.shards if not run.missing(s)})
    own = [s for s in run.plan.shards if run.plan.own is None or s.name in run.plan.own]
    progress.merge_bytes = sum(shard.nbytes * len(run.missing(shard)) for shard in own)
    progress.send_bytes = sum(branch.sink.bytes_to_send for branch in run.branches)
    progress.start_merging()
    if processes.is_main:
        for shard in run.plan.shards:
            for branch in run.branches:
                if shard.name in branch.kept:
                    yield _finished(run, branch, shard, branch.kept[shard.name], resumed=True)
    yield from processes.everyones(_merge_own(run, work), first, progress)
    if not processes.is_main:
        return
    for branch in run.branches if run.plan.own is not None else ():
        entries = branch.sink.by_now()  # what other parts finished while this one merged
        for shard in run.plan.shards:
            entry = entries.get(shard.name)
            if entry is None:
                branch.files.pop(shard.name, None)
            elif branch.files.get(shard.name, {}).get("sha256") != entry["sha256"]:
                yield _finished(run, branch, shard, entry, resumed=True)
    if not run.unfinished:
        yield from _merge_lost(run)
    check_sources(run.plan)


def _merge_own(run: Run, work: WorkList) -> Iterator[Event]:
    """Merge this process's shards, and wait until they are where they have to be."""
    stores = [source.store for source in run.plan.checkpoints if source.is_remote]
    for store in stores:
        store.checks = run.plan.options.check_sources != "none"
    shards, own = iter(work), list[Shard]()
    shard, doubted = next(shards, None), None
    while shard is not None:
        with reading_ahead_of(run.plan, _order(run, work.ahead())):
            while shard is not None:
                before = run.progress.bytes_written
                try:
                    yield from _merge_shard(run, shard, run.missing(shard))
                except NonFiniteError:
                    if doubted is shard or not stores:
                        raise
                    # It may have come on the way: all of the shard is read once more.
                    doubted, run.progress.bytes_written = shard, before
                    for store in stores:
                        store.forget_links()
                    break
                own.append(shard)
                yield from _merge_damaged(run, own)
                shard = next(shards, None)
    for branch in run.branches:
        yield from run.waiting(branch.sink.settle)


def _order(run: Run, shards: Iterator[Shard | None]) -> Iterator[PlannedTensor | None]:
    """Yield the tensors of shards as they will be read; None where no shard is known yet."""
    for shard in shards:
        if shard is None:
            yield None
        else:
            plans = {label: branch.plan for label, branch in run.missing(shard).items()}
            yield from shared_order(plans, _names(run.plan, shard))


def _names(plan: Plan, shard: Shard) -> list[str]:
    return [tensor.spec.name for tensor in plan.written_in(shard)]


def _merge_damaged(run: Run, own: Sequence[Shard]) -> Iterator[Event]:
    """Merge again what was made of files that came as others than the Hub names.

    Raises:
        StoppedError: they come so a second time.
    """
    for last in (False, True):
        damaged, names = set(), []
        for source in run.plan.checkpoints:
            files, source.store.damaged = source.store.damaged, frozenset()
            if not files:
                continue
            names += [f"{source.id}/{file}" for file in sorted(files)]
            source.store.forget_links()
            damaged |= {
                shard.name
                for shard in own
                for name in _names(run.plan, shard)
                if name in source.tensors
                and any(reading.tensor.file in files for reading in source.readings(name))
            }
        if not names:
            return
        if last:
            raise StoppedError(
                f"{listed(names)}: read twice, and both times the bytes did not match the Hub's "
                "sha256. Shards were made of them.",
                Remedy.DISCARD_STAGING,
            )
        for shard in own:
            if shard.name in damaged:
                yield from _merge_shard(run, shard, run.missing(shard))


def _merge_lost(run: Run) -> Iterator[Event]:
    """Merge again what is not at the target as it was put there.

    Raises:
        StoppedError: it is changed there again and again.
    """
    for branch in run.branches:
        for _ in range(_RESENT_TRIES):
            names = branch.sink.lost(branch.files.values())
            if not names:
                break
            for shard in run.plan.shards:
                if shard.name in names:
                    yield from _merge_shard(run, shard, {branch.label: branch})
            yield from run.waiting(branch.sink.settle)
        else:
            if names := branch.sink.lost(branch.files.values()):
                raise StoppedError(
                    f"{listed(names)}: somebody changes these shards at the target whenever they "
                    "are finished, so nothing is published.",
                    Remedy.CONTINUE,
                )


def _finished(
    run: Run, branch: Branch, shard: Shard, entry: Mapping[str, Any], *, resumed: bool
) -> ShardFinished:
    """Take a finished shard's row of the journal, and tell of it."""
    run.progress.start_sending()
    branch.rows |= {row["name"]: row for row in entry["tensors"]}
    branch.files[shard.name] = {key: entry[key] for key in ("name", "size", "sha256")}
    branch.seen[shard.name] = entry.get("similarity")
    return ShardFinished(
        shard=f"{branch.label}/{shard.name}" if branch.label else shard.name,
        bytes=shard.nbytes,
        sha256=entry["sha256"],
        resumed=resumed,
        shards_done=len(branch.files),
        shards=len(run.plan.shards),
        **run.progress.now(),
    )


class _OpenShard:
    """A shard of one branch while it is written."""

    def __init__(self, branch: Branch, shard: Shard) -> None:
        self.branch, self._shard = branch, shard
        self._writer = branch.sink.open_shard(shard)
        self.queue = WriteBehind(WRITE_QUEUE_BYTES)
        self.assembly = Assembly(self._write)
        self.rows, self.entries = Rows(len(branch.plan.experts)), list[dict[str, Any]]()
        self._is_finished = False

    def _write(self, data: memoryview) -> None:
        self.queue.put(len(data), lambda: self._writer.write(data))

    def finish(self, watch: Watch | None) -> dict[str, Any]:
        """Make the shard durable; return its row of the journal, which is kept."""
        sha256 = self._writer.finish()
        self._is_finished = True
        shard = self._shard
        entry: dict[str, Any] = {
            "name": shard.name, "size": shard.nbytes, "sha256": sha256, "tensors": self.entries,
        }  # fmt: skip
        if watch is not None:
            entry["similarity"] = watch.to_dict()
        self.branch.sink.keep(shard, entry)
        return entry

    def close(self) -> None:
        """End the writing; drop what is not finished."""
        self.queue.close()
        if not self._is_finished:
            self._writer.abort()


def _merge_shard(run: Run, shard: Shard, branches: Mapping[str, Branch]) -> Iterator[Event]:
    """Merge one shard for some branches. What was merged before does not count as written twice."""
    progress, before = run.progress, run.progress.bytes_written
    is_again = any(shard.name in branch.files for branch in branches.values())
    watch = None if run.watch is None else run.watch(list(branches))
    for branch in branches.values():
        yield from run.waiting(partial(branch.sink.make_room, shard))
    with contextlib.ExitStack() as stack:
        outputs: dict[str, _OpenShard] = {}
        for label, branch in branches.items():
            outputs[label] = stack.enter_context(contextlib.closing(_OpenShard(branch, shard)))
        chain = stack.enter_context(contextlib.closing(_prepared(run, shard, branches)))
        for prepared in chain:
            if prepared is None:
                yield Progressed(**progress.now())
                continue
            yield from _told(run, prepared, outputs, _written(run, prepared, outputs, watch))
        for output in outputs.values():
            yield from run.waiting(output.queue.drain)
        entries = {label: output.finish(watch) for label, output in outputs.items()}
    if is_again:
        progress.bytes_written = before
    for label, branch in branches.items():
        yield _finished(run, branch, shard, entries[label], resumed=False)


def _prepared(
    run: Run, shard: Shard, branches: Mapping[str, Branch]
) -> Generator[dict[str, Prepared] | None, None, None]:
    """Yield the shard's pieces in file order, read and decided ahead by threads, by branch.

    None comes once a second while the next one is not ready.
    """
    plans = {label: branch.plan for label, branch in branches.items()}
    merger = next(iter(branches.values())).merger

    def read(nbytes: int) -> None:
        run.progress.bytes_read += nbytes

    def prepare(shared: Shared[str]) -> dict[str, Prepared]:
        return {label: branches[label].merger.prepare(own) for label, own in shared.pieces.items()}

    def held(prepared: Mapping[str, Prepared]) -> int:
        return sum(one.held_bytes for one in prepared.values())

    return worked_ahead(
        shared_reads(plans, _names(run.plan, shard)),
        prepare if run.watch is None else partial(_decide, branches),
        read_bytes=run.plan.read_ahead_bytes or READ_AHEAD_BYTES,
        work_bytes=run.plan.working_bytes,
        cost=lambda shared: shared.lead_piece.tensor.working_bytes,
        workers=workers(merger.device, merger.threads),
        cores=merger.cores,
        keeps=held if run.watch is None else None,
        on_read=read,
        tick=_TICK_S,
    )


def _decide(branches: Mapping[str, Branch], shared: Shared[str]) -> dict[str, Prepared]:
    """Decide about a piece by all branches, on the same task vectors and heads."""
    piece, lead = shared.lead_piece, branches[shared.lead].merger
    if piece.tensor.rule is None:
        return {label: Carried(own) for label, own in shared.pieces.items()}
    decided: dict[str, Prepared] = {}
    with lead.naming(piece.tensor):
        base, vectors = lead.open(piece)
        for label, own in shared.pieces.items():
            with branches[label].timed():
                rule = own.tensor.rule or piece.tensor.rule
                decided[label] = branches[label].merger.decide(own, rule, base, vectors)
    return decided


def _written(
    run: Run,
    prepared: Mapping[str, Prepared],
    outputs: Mapping[str, _OpenShard],
    watch: Watch | None,
) -> dict[str, Kept]:
    """Write a piece by every branch; return what the casts kept."""
    decided = {label: one for label, one in prepared.items() if isinstance(one, Decided)}
    if watch is None or not decided:
        return {
            label: outputs[label].branch.merger.written(one, outputs[label].assembly)
            for label, one in prepared.items()
        }
    first = next(iter(decided.values()))
    vectors, merger = first.vectors, next(iter(outputs.values())).branch.merger
    kept = {label: Kept() for label in decided}
    takers = {label: outputs[label].assembly.of(one.piece) for label, one in decided.items()}

    def merge(rows: slice) -> tuple[dict[str, MergedRows], Tensor | None, bool]:
        stack, base = vectors.block(rows)
        merged, updates = {}, {}
        for label, one in decided.items():
            branch = outputs[label].branch
            with branch.timed():
                updates[label] = one.update.rows(rows, stack)
                merged[label] = branch.merger.merge_rows(one, rows, updates[label], base)
        is_zero = vectors.is_zero(rows)
        return merged, None if is_zero else watch.products(updates, stack), is_zero

    # While a large tensor is written, the others have to wait: so its blocks go ahead.
    threads = block_threads(vectors, merger.threads)
    with (
        merger.naming(first.piece.tensor),
        contextlib.closing(blocks_ahead(vectors.blocks(), merge, threads)) as blocks,
    ):
        for rows, (merged, products, is_zero) in blocks:
            for label, one in merged.items():
                kept[label].absorb(one.kept)
                takers[label](one.data)
            if not is_zero:
                watch.add(products, first.piece.tensor.experts)
            first.piece.release(rows)
    run.progress.peak.look()
    vectors.close()
    return kept


def _told(
    run: Run,
    prepared: Mapping[str, Prepared],
    outputs: Mapping[str, _OpenShard],
    kept: Mapping[str, Kept],
) -> Iterator[Event]:
    """Note a piece that was written; yield what is told after a tensor's last one."""
    for label, one in prepared.items():
        output = outputs[label]
        if isinstance(one, Carried):
            entry = output.rows.carried(one.piece.tensor, is_last=one.piece.is_last)
        else:
            decided = one.decided if isinstance(one, Merged) else one
            entry = output.rows.merged(
                decided.piece.tensor,
                decided.rule,
                decided.update,
                kept[label],
                decided.remarks,
                is_copy=decided.is_copy,
                is_last=decided.piece.is_last,
                unmoved=decided.unmoved,
                alike=decided.alike,
            )
        if entry is None:
            continue
        output.entries.append(entry)
        name = entry["name"]
        run.progress.bytes_written += output.branch.plan.tensors[name].output_bytes
        yield TensorMerged(
            tensor=f"{label}: {name}" if label else name,
            rule=entry["rule"],
            entry=entry,
            **run.progress.now(),
        )


def report_of(run: Run, branch: Branch, processes: Processes) -> dict[str, Any]:
    """Return the report of a branch that is merged."""
    plan, progress = branch.plan, run.progress
    bytes_read, bytes_written, _ = progress.totals()
    if len(run.branches) > 1:
        made = [s for s in plan.shards if s.name not in branch.kept]
        bytes_written = sum(plan.tensors[n].output_bytes for s in made for n in _names(plan, s))
    return build_report(
        plan,
        branch.merger.counted,
        [branch.rows[name] for shard in plan.shards for name in _names(plan, shard)],
        [branch.files[shard.name] for shard in plan.shards],
        environment=environment(branch.merger) | {"processes": processes.size},
        seconds=progress.seconds if run.watch is None else branch.seconds,
        bytes_read=bytes_read,
        bytes_written=bytes_written,
        peak_private_bytes=progress.peak.bytes,
    )


def environment(merger: Merger) -> dict[str, Any]:
    """Return what the numbers may depend on beside the sources: versions, device, threads."""
    return {
        "resmerge_stream": __version__,
        "torch": str(torch.__version__),
        "device": str(merger.device),
        "threads": workers(merger.device, merger.threads),
    }


def check_sources(plan: Plan, *, on_hub: bool = True) -> None:
    """See that every model is still the one whose headers were read.

    Args:
        plan: names them.
        on_hub: whether the Hub is asked as well, patiently.

    Raises:
        SourceChangedError: a weight file was written, replaced or cut short.
        CheckpointNotFoundError: one is gone.
        StoppedError: a disk failed.
    """
    for source in plan.checkpoints:
        if on_hub or source.folder is not None:
            source.check()
