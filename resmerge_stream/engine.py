"""The loop: read ahead, merge, cast, write behind, shard by shard; a generator of events."""

import contextlib
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from .card import render_card
from .device import choose_device, default_work_dir, private_memory
from .errors import NonFiniteError
from .events import Event, Finished, Planned, Published, ShardFinished, TensorMerged
from .layout import Shard
from .memory import WRITE_QUEUE_BYTES
from .merging import Merger, Output
from .pipes import ReadAhead, WriteBehind
from .plan import Plan, PlannedTensor
from .report import build_report
from .sinks import FolderSink, Sink, target_state
from .sinks.folder import REPORT, discard
from .version import __version__

# Bytes of sources that may be read ahead; from a folder these are mapped pages, not private memory.
READ_AHEAD_BYTES = 256_000_000
# A tensor merged by rows is read in ranges of about this many bytes a source.
PIECE_BYTES = 16_000_000


@dataclass(frozen=True, slots=True)
class Piece:
    """Some rows of a tensor, read: the bytes of the base, then of each expert."""

    tensor: PlannedTensor
    start_row: int
    stop_row: int
    is_last: bool
    buffers: list[memoryview]


@dataclass(slots=True)
class _Progress:
    started: float = field(default_factory=time.monotonic)
    bytes_read: int = 0
    bytes_written: int = 0
    peak_private: int = 0
    entries: list[dict[str, Any]] = field(default_factory=list)
    files: list[dict[str, Any]] = field(default_factory=list)


def run_merge(
    plan: Plan, *, out: str | Path, work_dir: str | Path | None = None
) -> Iterator[Event]:
    """Run a plan, and yield what happens.

    Closing the generator cancels: finished shards stay for a later run of the same plan, nothing
    half-made has a final name.

    Args:
        plan: from `plan_merge`.
        out: the output folder.
        work_dir: where journals are kept; the user's cache folder when None.

    Raises:
        PlanRefusedError: the plan has problems, or the sources changed since a first run.
        NonFiniteError: a weight is NaN or infinite, or overflows the output dtype.
        StoppedError: disk or permission; the same command continues.

    Memory: `plan.peak_memory_bytes`, whatever the model's size.
    """
    out = Path(out).expanduser()
    plan.raise_if_refused()
    if target_state(out, plan.plan_hash).finished:
        yield Finished(where=str(out), report=_read_report(out), already_there=True)
        return
    root = Path(work_dir).expanduser() if work_dir is not None else default_work_dir()
    target = f"{plan.plan_hash}-{_target_key(out)}"
    identity = {f"{i} {source.id}": source.identity for i, source in enumerate(plan.checkpoints)}
    sink = FolderSink(out, plan.plan_hash, root / target, identity)
    try:
        yield from _run(plan, sink)
    except NonFiniteError:
        # This run can never be finished, so it leaves nothing behind.
        sink.close()
        with contextlib.suppress(OSError):
            discard(out)
        raise
    finally:
        sink.close()


def _run(plan: Plan, sink: Sink) -> Iterator[Event]:
    progress = _Progress()
    yield Planned(plan=plan.to_dict())
    merger = Merger(plan, choose_device(plan.options.device))
    kept = sink.finished_shards()
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
        )
    report = build_report(
        plan,
        progress.entries,
        progress.files,
        environment=_environment(merger.device),
        seconds=time.monotonic() - progress.started,
        bytes_read=progress.bytes_read,
        bytes_written=progress.bytes_written,
        peak_private_bytes=progress.peak_private,
    )
    files = plan.side_files() | render_card(plan, report)
    where = sink.publish(files)
    yield Published(where=where)
    yield Finished(where=where, report=report)


def _merge_shard(
    plan: Plan, shard: Shard, sink: Sink, merger: Merger, progress: _Progress
) -> Generator[Event, None, dict[str, Any]]:
    """Merge one shard; the generator's value is its journal entry."""
    tensors = [plan.tensors[spec.name] for spec in shard.tensors]
    writer = sink.open_shard(shard)
    reader = ReadAhead(_jobs(plan, tensors), READ_AHEAD_BYTES)
    queue = WriteBehind(WRITE_QUEUE_BYTES)
    entries: list[dict[str, Any]] = []
    finished = False

    def write(data: memoryview) -> None:
        queue.put(len(data), lambda: writer.write(data))

    try:
        for piece in reader:
            entry = _merge_piece(piece, merger, write, progress)
            if entry is not None:
                entries.append(entry)
                progress.bytes_written += piece.tensor.spec.nbytes
                yield TensorMerged(
                    tensor=piece.tensor.spec.name,
                    rule=entry["rule"],
                    entry=entry,
                    bytes_read=progress.bytes_read,
                    bytes_written=progress.bytes_written,
                )
        queue.drain()
        sha256 = writer.finish()
        finished = True
    finally:
        reader.close()
        queue.close()
        if not finished:
            writer.abort()
    result = {"name": shard.name, "size": shard.nbytes, "sha256": sha256, "tensors": entries}
    sink.keep(shard, result)
    return result


def _merge_piece(
    piece: Piece, merger: Merger, write: Callable[[memoryview], None], progress: _Progress
) -> dict[str, Any] | None:
    """Merge and queue one piece; return the tensor's row of the report after its last piece."""
    progress.bytes_read += sum(len(buffer) for buffer in piece.buffers)
    output = Output(write, lambda: _sample(progress))
    return merger.merge(
        piece.tensor, piece.start_row, piece.stop_row, piece.buffers, output, last=piece.is_last
    )


def _sample(progress: _Progress) -> None:
    progress.peak_private = max(progress.peak_private, private_memory())


def _jobs(plan: Plan, tensors: list[PlannedTensor]) -> Iterator[tuple[int, Callable[[], Piece]]]:
    """Yield what to read, in order: bytes and a function that reads them."""
    for tensor in tensors:
        sources = list(plan.checkpoints) if tensor.rule else [plan.base]
        rows, _ = tensor.spec.matrix_shape
        step = max(rows, 1)
        if tensor.rule is None or (tensor.rule.in_pieces and not tensor.rule.needs_matrix):
            step = max(PIECE_BYTES * rows // max(tensor.spec.nbytes, 1) // 16 * 16, 16)
        for start in range(0, max(rows, 1), step):
            stop = min(start + step, rows)
            size = sum(
                end - begin
                for source in sources
                if source is not None
                for begin, end in [source.tensors[tensor.spec.name].byte_range(start, stop)]
            )

            def load(
                tensor: PlannedTensor = tensor,
                start: int = start,
                stop: int = stop,
                rows: int = rows,
                sources: list[Any] = sources,
            ) -> Piece:
                name = tensor.spec.name
                buffers = [source.read(name, start, stop) for source in sources]
                return Piece(tensor, start, stop, stop >= rows, buffers)

            yield size, load


def _environment(device: torch.device) -> dict[str, Any]:
    return {
        "resmerge_stream": __version__,
        "torch": str(torch.__version__),
        "device": str(device),
        "threads": torch.get_num_threads(),
    }


def _target_key(out: Path) -> str:
    import hashlib

    return hashlib.sha256(str(out.resolve()).encode()).hexdigest()[:8]


def _read_report(out: Path) -> dict[str, Any]:
    import json

    report: dict[str, Any] = json.loads((out / REPORT).read_text(encoding="utf-8"))
    return report
