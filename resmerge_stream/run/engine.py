"""The loop: read ahead, merge, cast, write behind, shard by shard; a generator of events."""

import contextlib
import os
from collections.abc import Callable, Generator, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from ..device import choose_device, give_memory_back, keep_memory_steady
from ..errors import NonFiniteError, Remedy, StoppedError, listed
from ..hub.patience import MERGING_S, PATIENCE
from ..memory import KEPT_BUFFER_BYTES, KEPT_FACTOR_BYTES, WRITE_QUEUE_BYTES
from ..pipes import WriteBehind, meanwhile
from ..planning.plan import Plan, PlannedTensor, RefusedPlan
from ..report.build import build_report
from ..report.card import render_card
from ..report.rows import Rows
from ..sinks import Sink
from ..sinks.journal import work_folder
from ..sinks.layout import Shard
from ..sources.checking import checked, files_of
from ..version import __version__
from .counting import counted
from .crew import Crew
from .difference import is_begun, refused_if_equal
from .events import Event, Finished, Planned, Progressed, Published, ShardFinished, TensorMerged
from .merging import Merged, Merger, Prepared, reported
from .opening import finished_already, open_sink
from .pieces import Assembly
from .pipeline import worked_ahead, workers
from .progress import Progress
from .reading import READ_AHEAD_BYTES, reading_ahead_of, reads
from .worklist import WorkList

# How long nothing may be heard of a run.
_TICK_S = 1.0
# How often shards that were changed at the target are made again.
_RESENT_TRIES = 3


def run_merge(
    plan: Plan | RefusedPlan,
    *,
    out: str | Path | None = None,
    work_dir: str | Path | None = None,
    crew: Crew | None = None,
) -> Iterator[Event]:
    """Run a plan, and yield what happens.

    Closing the generator cancels: finished shards stay for a later run of the same plan, nothing
    half-made has a final name.

    Args:
        plan: from `plan_merge`; it names the repository to publish to, if any.
        out: the output folder, if any.
        work_dir: where journals are kept; the user's cache folder when None.
        crew: the processes that run the plan together; this one alone when None. The main one
            yields what happens in all of them, the others what they do themselves.

    Raises:
        PlanRefusedError: the plan is refused, no expert differs from the base in any value, or the
            sources changed since a first run.
        NonFiniteError: a weight is NaN or infinite, or overflows the output dtype.
        OutputExistsError: somebody else put something there since the plan was made.
        StoppedError: disk, network or permission; the same command continues.

    Memory: `plan.peak_memory_bytes`, whatever the model's size.
    """
    crew = crew or Crew()
    plan = plan.accepted()
    crew.agree(plan)
    folder = Path(os.path.expanduser(out)) if out is not None else None
    done = finished_already(plan, folder) if crew.is_main else None
    planned, is_told = Planned(plan=plan.to_dict()), False
    if crew.is_main and done is None and not is_begun(plan, folder):
        with PATIENCE.of(plan.options.patience or MERGING_S):
            is_told = yield from refused_if_equal(plan, planned)
    if crew.shared("finished", lambda: done is not None):
        yield from () if done is None else (done,)
        return
    is_adapter = plan.options.output == "adapter"
    keep_memory_steady(KEPT_FACTOR_BYTES if is_adapter else KEPT_BUFFER_BYTES)
    device = choose_device(plan.options.device)
    work_dir = work_folder(plan.plan_hash, folder, plan.publication, work_dir)
    membership = crew.membership()
    with crew.main_first("open"):
        sink = open_sink(plan, folder, work_dir, membership)
    with contextlib.closing(sink), PATIENCE.of(plan.options.patience or MERGING_S):
        try:
            progress = Progress(lambda: sink.bytes_sent)
            if not is_told:
                yield planned
            found = yield from _counted(plan, device, work_dir, crew)
            merger = Merger(plan, device, found, progress.sample_memory)
            yield from _merge(plan, sink, merger, progress, crew)
            if crew.is_main:
                yield from _merge_lost(plan, sink, merger, progress)
                yield from _finish(plan, sink, merger, progress, crew)
        except NonFiniteError as exc:
            if crew.is_main:
                crew.stop_others(exc)
                if not any(source.is_remote for source in plan.checkpoints):
                    # It is on this disk, so this run can never be finished: nothing is left behind.
                    sink.abandon()
            raise


def _counted(
    plan: Plan, device: torch.device, work_dir: Path, crew: Crew
) -> Generator[Event, None, dict[str, Any]]:
    """Make the method's counting passes in the main process; the value is what they found."""
    found: list[dict[str, Any]] = [{}]
    if not plan.method.counting_passes():
        return found[0]
    if crew.is_main:
        found = yield from counted([plan], device, work_dir / "counted.json")
    return crew.shared("counted", lambda: found[0])


def _merge(
    plan: Plan, sink: Sink, merger: Merger, progress: Progress, crew: Crew
) -> Iterator[Event]:
    """Merge what is left, this process its part of it."""
    kept = crew.gathered("kept", sink.finished_shards())
    work = crew.work(plan, kept)
    progress.merge_bytes = sum(shard.nbytes for shard in plan.shards if shard.name not in kept)
    progress.send_bytes = sink.bytes_to_send
    progress.start_merging()
    if crew.is_main:
        for shard in plan.shards:
            if shard.name in kept:
                yield _finished(plan, shard, kept[shard.name], progress, resumed=True)
    own = _merge_own(plan, work, sink, merger, progress)
    yield from crew.everyones(own, plan.shards, progress)


def _merge_own(
    plan: Plan, work: WorkList, sink: Sink, merger: Merger, progress: Progress
) -> Iterator[Event]:
    """Merge this process's shards, and wait until they are where they have to be."""
    sources = list(checked(plan.checkpoints))
    for source in sources:
        source.checks = plan.options.check_sources
    shards, own = iter(work), []
    shard, doubted = next(shards, None), None
    while shard is not None:
        with reading_ahead_of(plan, _tensors_of(plan, work.ahead())):
            while shard is not None:
                before = progress.bytes_written
                try:
                    entry = yield from _merge_shard(plan, shard, sink, merger, progress)
                except NonFiniteError:
                    if doubted is shard or not sources:
                        raise
                    # It may have come on the way: all of the shard is read once more.
                    doubted, progress.bytes_written = shard, before
                    for source in sources:
                        source.forget_links()
                    break
                yield _finished(plan, shard, entry, progress, resumed=False)
                own.append(shard)
                yield from _merge_damaged(plan, own, sink, merger, progress)
                shard = next(shards, None)
    yield from _waiting(sink.settle, progress)


def _tensors_of(plan: Plan, shards: Iterator[Shard | None]) -> Iterator[PlannedTensor | None]:
    for shard in shards:
        yield from plan.written_in(shard) if shard is not None else (None,)


def _merge_damaged(
    plan: Plan, own: list[Shard], sink: Sink, merger: Merger, progress: Progress
) -> Iterator[Event]:
    """Merge again what was made of files that came as others than the Hub names.

    Raises:
        StoppedError: they come so a second time.
    """
    for last in (False, True):
        damaged, names = set(), []
        for source in plan.checkpoints:
            for stored in checked(iter((source,))):
                files, stored.damaged = stored.damaged, set()
                names += [f"{source.id}/{file}" for file in sorted(files)]
                stored.forget_links()
                damaged |= {
                    shard.name
                    for shard in own
                    for tensor in plan.written_in(shard)
                    if files and files_of(source, tensor.spec.name) & files
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
                before = progress.bytes_written
                entry = yield from _merge_shard(plan, shard, sink, merger, progress)
                progress.bytes_written = before
                yield _finished(plan, shard, entry, progress, resumed=False)


def _merge_lost(plan: Plan, sink: Sink, merger: Merger, progress: Progress) -> Iterator[Event]:
    """Merge again what is not at the target as it was put there.

    Raises:
        StoppedError: it is changed there again and again.
    """
    for _ in range(_RESENT_TRIES):
        names = sink.lost(progress.files.values())
        if not names:
            return
        for shard in plan.shards:
            if shard.name in names:
                entry = yield from _merge_shard(plan, shard, sink, merger, progress)
                yield _finished(plan, shard, entry, progress, resumed=False)
        yield from _waiting(sink.settle, progress)
    if names := sink.lost(progress.files.values()):
        raise StoppedError(
            f"{listed(names)}: somebody changes these shards at the target whenever they are "
            "finished, so nothing is published.",
            Remedy.CONTINUE,
        )


def _finished(
    plan: Plan, shard: Shard, entry: Mapping[str, Any], progress: Progress, *, resumed: bool
) -> ShardFinished:
    progress.finish(entry)
    return ShardFinished(
        shard=shard.name,
        bytes=shard.nbytes,
        sha256=entry["sha256"],
        resumed=resumed,
        shards_done=len(progress.files),
        shards=len(plan.shards),
        **progress.now(),
    )


def _finish(
    plan: Plan, sink: Sink, merger: Merger, progress: Progress, crew: Crew
) -> Iterator[Event]:
    """Write the report and the card, and publish."""
    give_memory_back()  # report and card need some
    bytes_read, bytes_written, _ = progress.totals()
    report = build_report(
        plan,
        merger.counted,
        [progress.rows[t.spec.name] for shard in plan.shards for t in plan.written_in(shard)],
        [progress.files[shard.name] for shard in plan.shards],
        environment=environment(merger.device) | {"processes": crew.size},
        seconds=progress.seconds,
        bytes_read=bytes_read,
        bytes_written=bytes_written,
        peak_private_bytes=progress.peak_private,
    )
    files = plan.side_files() | render_card(plan, report, name_private=plan.name_private)
    where = sink.publish(files)
    yield Published(where=where)
    yield Finished(where=where, report=report)


def _merge_shard(
    plan: Plan, shard: Shard, sink: Sink, merger: Merger, progress: Progress
) -> Generator[Event, None, dict[str, Any]]:
    """Merge one shard; the generator's value is its journal entry."""
    yield from _waiting(lambda: sink.make_room(shard), progress)
    writer = sink.open_shard(shard)
    entries: list[dict[str, Any]] = []
    rows = Rows(len(plan.experts))
    finished = False
    with contextlib.ExitStack() as threads:
        threads.callback(lambda: None if finished else writer.abort())
        queue = WriteBehind(WRITE_QUEUE_BYTES)
        threads.callback(queue.close)

        def write(data: memoryview) -> None:
            queue.put(len(data), lambda: writer.write(data))

        assembly = Assembly(write)
        chain = threads.enter_context(contextlib.closing(_prepared(plan, shard, merger, progress)))
        for prepared in chain:
            if prepared is None:
                yield Progressed(**progress.now())
                continue
            entry = reported(rows, prepared, merger.written(prepared, assembly))
            if entry is None:
                continue
            entries.append(entry)
            tensor = plan.tensors[entry["name"]]
            progress.bytes_written += tensor.output_bytes
            yield TensorMerged(
                tensor=tensor.spec.name,
                rule=entry["rule"],
                entry=entry,
                **progress.now(),
            )
        yield from _waiting(queue.drain, progress)
        sha256 = writer.finish()
        finished = True
    result = {"name": shard.name, "size": shard.nbytes, "sha256": sha256, "tensors": entries}
    sink.keep(shard, result)
    return result


def _waiting(call: Callable[[], None], progress: Progress) -> Iterator[Event]:
    """Do what may take long; yield how far the run is until it is done."""
    return meanwhile(call, _TICK_S, lambda: Progressed(**progress.now()))


def _prepared(
    plan: Plan, shard: Shard, merger: Merger, progress: Progress
) -> Generator[Prepared | None, None, None]:
    """Yield the shard's pieces in file order, read and decided ahead by threads.

    None comes once a second while the next one is not ready.
    """

    def read(nbytes: int) -> None:
        progress.bytes_read += nbytes

    return worked_ahead(
        reads(plan, plan.written_in(shard)),
        merger.prepare,
        read_bytes=plan.read_ahead_bytes or READ_AHEAD_BYTES,
        work_bytes=plan.working_bytes,
        cost=lambda piece: plan.working_bytes_of(piece.tensor),
        workers=workers(merger.device),
        cores=merger.cores,
        keeps=lambda prepared: len(prepared.data) if isinstance(prepared, Merged) else 0,
        on_read=read,
        tick=_TICK_S,
    )


def environment(device: torch.device) -> dict[str, Any]:
    """Return what the numbers may depend on beside the sources: versions, device, threads."""
    return {
        "resmerge_stream": __version__,
        "torch": str(torch.__version__),
        "device": str(device),
        "threads": workers(device),
    }
