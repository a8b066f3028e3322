"""The loop: read ahead, merge, cast, write behind, shard by shard; a generator of events."""

import contextlib
import os
from collections.abc import Callable, Generator, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from .card import render_card
from .counting import counted
from .device import choose_device, keep_memory_steady, usable_cores
from .errors import NonFiniteError
from .events import Event, Finished, Planned, Progressed, Published, ShardFinished, TensorMerged
from .layout import Shard
from .memory import WRITE_QUEUE_BYTES
from .merging import Merger, Prepared
from .opening import finished_already, open_sink
from .pieces import Piece, row_ranges
from .pipes import Ahead, Held, WriteBehind, meanwhile
from .plan import Plan, PlannedTensor
from .progress import Progress
from .publication import work_folder
from .report import build_report
from .sinks import Sink
from .sources import Checkpoint
from .sources.ahead import Followed, reading_ahead
from .version import __version__

# Bytes of sources that may be read ahead; from a folder these are mapped pages, not private memory.
READ_AHEAD_BYTES = 256_000_000
# How long nothing may be heard of a run.
_TICK_S = 1.0


def run_merge(
    plan: Plan, *, out: str | Path | None = None, work_dir: str | Path | None = None
) -> Iterator[Event]:
    """Run a plan, and yield what happens.

    Closing the generator cancels: finished shards stay for a later run of the same plan, nothing
    half-made has a final name.

    Args:
        plan: from `plan_merge`; it names the repository to publish to, if any.
        out: the output folder, if any.
        work_dir: where journals are kept; the user's cache folder when None.

    Raises:
        PlanRefusedError: the plan has problems, or the sources changed since a first run.
        NonFiniteError: a weight is NaN or infinite, or overflows the output dtype.
        OutputExistsError: somebody else put something there since the plan was made.
        StoppedError: disk, network or permission; the same command continues.

    Memory: `plan.peak_memory_bytes`, whatever the model's size.
    """
    plan.raise_if_refused()
    folder = Path(os.path.expanduser(out)) if out is not None else None
    done = finished_already(plan, folder)
    if done is not None:
        yield done
        return
    keep_memory_steady()
    device = choose_device(plan.options.device)
    work = work_folder(plan.plan_hash, folder, plan.publication, work_dir)
    sink = open_sink(plan, folder, work)
    try:
        yield from _run(plan, sink, work, device)
    except NonFiniteError:
        # This run can never be finished, so it leaves nothing behind.
        sink.abandon()
        raise
    finally:
        sink.close()


def _run(plan: Plan, sink: Sink, work_dir: Path, device: torch.device) -> Iterator[Event]:
    progress = Progress(lambda: sink.bytes_sent)
    yield Planned(plan=plan.to_dict())
    merger = Merger(plan, device, progress.sample_memory)
    if plan.opened[1].counting_passes():
        with _reading_ahead(plan, [tensor for tensor in plan.tensors.values() if tensor.rule]):
            yield from counted([plan], [merger], reads, work_dir / "counted.json")
    kept = sink.finished_shards()
    unmerged = [shard for shard in plan.shards if shard.name not in kept]
    progress.merge_bytes = sum(shard.nbytes for shard in unmerged)
    progress.send_bytes = sink.bytes_to_send
    progress.start_merging()
    with _reading_ahead(plan, (plan.tensors[t.name] for shard in unmerged for t in shard.tensors)):
        for shard in plan.shards:
            entry = kept.get(shard.name)
            if entry is None:
                entry = yield from _merge_shard(plan, shard, sink, merger, progress)
            progress.entries += entry["tensors"]
            progress.files.append({key: entry[key] for key in ("name", "size", "sha256")})
            yield ShardFinished(
                shard=shard.name,
                bytes=shard.nbytes,
                sha256=entry["sha256"],
                resumed=shard.name in kept,
                shards_done=len(progress.files),
                shards=len(plan.shards),
                **progress.now(),
            )
    yield from _waiting(sink.settle, progress)
    report = build_report(
        plan,
        progress.entries,
        progress.files,
        environment=environment(merger.device),
        seconds=progress.seconds,
        bytes_read=progress.bytes_read,
        bytes_written=progress.bytes_written,
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
    finished = False
    with contextlib.ExitStack() as threads:
        threads.callback(lambda: None if finished else writer.abort())
        queue = WriteBehind(WRITE_QUEUE_BYTES)
        threads.callback(queue.close)

        def write(data: memoryview) -> None:
            queue.put(len(data), lambda: writer.write(data))

        for prepared in _prepared(plan, shard, merger, progress, threads):
            if prepared is None:
                yield Progressed(**progress.now())
                continue
            entry = merger.finish(prepared, write)
            if entry is None:
                continue
            entries.append(entry)
            spec = prepared.piece.tensor.spec
            progress.bytes_written += spec.nbytes
            yield TensorMerged(
                tensor=spec.name,
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
    plan: Plan, shard: Shard, merger: Merger, progress: Progress, threads: contextlib.ExitStack
) -> Iterator[Prepared | None]:
    """Yield the shard's pieces in file order, read and decided ahead by threads.

    None comes once a second while the next one is not ready.
    """
    tensors = [plan.tensors[spec.name] for spec in shard.tensors]
    reader = Ahead(reads(plan, tensors), plan.read_ahead_bytes or READ_AHEAD_BYTES)
    threads.callback(reader.close)

    def decisions() -> Iterator[tuple[int, Callable[[], tuple[Held[Piece], Prepared]]]]:
        for held in reader:
            progress.bytes_read += sum(len(buffer) for buffer in held.value.buffers)

            def decide(held: Held[Piece] = held) -> tuple[Held[Piece], Prepared]:
                return held, merger.prepare(held.value)

            yield plan.working_bytes_of(held.value.tensor), decide

    decider = Ahead(
        decisions(),
        plan.working_bytes,
        workers=workers(merger.device),
        keeps=lambda done: done[1].nbytes,
    )
    threads.callback(decider.close)
    for decided in decider.within(_TICK_S):
        if decided is None:
            yield None
            continue
        piece, prepared = decided.value
        yield prepared
        del prepared
        piece.value.close()
        piece.release()
        decided.release()


def workers(device: torch.device) -> int:
    """Return how many tensors are decided at once: one a core, or one at a time on a GPU."""
    return usable_cores() if device.type == "cpu" else 1


def reads(plan: Plan, tensors: list[PlannedTensor]) -> Iterator[tuple[int, Callable[[], Piece]]]:
    """Yield what to read, in order: bytes and a function that reads them."""
    for tensor in tensors:
        name = tensor.spec.name
        sources = list(plan.checkpoints) if tensor.rule else [plan.opened[0]]
        for start, stop, is_last in row_ranges(tensor):
            ranges = [source.tensors[name].byte_range(start, stop) for source in sources]

            def read(
                tensor: PlannedTensor = tensor,
                sources: list[Checkpoint] = sources,
                start: int = start,
                stop: int = stop,
                is_last: bool = is_last,
            ) -> Piece:
                name = tensor.spec.name
                buffers = [source.read(name, start, stop) for source in sources]
                release = _releaser(tensor, sources, start, stop)
                close = _closer(name, sources, start, stop)
                return Piece(tensor, start, stop, is_last, buffers, release, close)

            yield sum(end - begin for begin, end in ranges), read


def _releaser(
    tensor: PlannedTensor, sources: list[Checkpoint], start: int, stop: int
) -> Callable[[slice], None]:
    is_slice = len(tensor.spec.shape) == 3 and stop - start == 1

    def release(rows: slice) -> None:
        first, last = (start, stop) if is_slice else (start + rows.start, start + rows.stop)
        for source in sources:
            source.release(tensor.spec.name, first, last)

    return release


def _closer(name: str, sources: list[Checkpoint], start: int, stop: int) -> Callable[[], None]:
    def close() -> None:
        for source in sources:
            source.done_with(name, start, stop)

    return close


def _reading_ahead(
    plan: Plan, tensors: Iterable[PlannedTensor]
) -> contextlib.AbstractContextManager[None]:
    """Let sources on the Hub know what will be read, across the shards."""
    remote = [source for source in plan.checkpoints if isinstance(source, Followed)]
    order = (
        (source, tensor.spec.name, start, stop)
        for tensor in tensors
        for start, stop, _ in row_ranges(tensor)
        for source in (remote if tensor.rule else remote[: int(plan.opened[0] in remote)])
    )
    return reading_ahead(order, remote, plan.read_ahead_bytes)


def environment(device: torch.device) -> dict[str, Any]:
    """Return what the numbers may depend on beside the sources: versions, device, threads."""
    return {
        "resmerge_stream": __version__,
        "torch": str(torch.__version__),
        "device": str(device),
        "threads": workers(device),
    }
