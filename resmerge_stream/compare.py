"""Several methods in one pass over the sources: each tensor read once, each SVD done once.

Every method gets its own folder, as `merge` would write it, byte for byte; or only its report.
Beside them stand a table and a picture that set the reports side by side.
"""

import contextlib
import json
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .card import render_card
from .compare_plan import Comparison
from .compare_report import Similarity, comparison_files, write_files
from .counting import counted
from .device import choose_device, default_work_dir, private_memory
from .engine import READ_AHEAD_BYTES, environment, read_report, reads, target_key, workers
from .errors import NonFiniteError
from .events import Event, Finished, Planned, Published, ShardFinished, TensorMerged
from .memory import WRITE_QUEUE_BYTES
from .merging import Merger, Piece, Prepared
from .pipes import Ahead, WriteBehind
from .report import build_report
from .sharing import Shared, shared_reads
from .sinks import FolderSink, ShardWriter, Sink, target_state
from .sinks.folder import discard
from .sinks.report_only import ReportOnlySink
from .task_vectors import NonFiniteValues, TaskVectors


@dataclass(frozen=True, slots=True)
class _Decided:
    """A piece with every method's decision and what each took; no vectors if carried through."""

    shared: Shared[str]
    prepared: dict[str, Prepared]
    vectors: TaskVectors | None = None
    seconds: dict[str, float] = field(default_factory=dict)


@dataclass(slots=True)
class _Method:
    """What is known of one method while the comparison runs."""

    sink: Sink
    merger: Merger
    seconds: float = 0.0
    bytes_written: int = 0
    entries: list[dict[str, Any]] = field(default_factory=list)
    files: list[dict[str, Any]] = field(default_factory=list)


@dataclass(slots=True)
class _Run:
    comparison: Comparison
    device: torch.device
    methods: dict[str, _Method]
    similarity: Similarity
    started: float = field(default_factory=time.monotonic)
    bytes_read: int = 0
    peak_private: int = 0

    def sample(self) -> None:
        """Take note of the memory in use."""
        self.peak_private = max(self.peak_private, private_memory())


def run_comparison(
    comparison: Comparison, *, work_dir: str | Path | None = None
) -> Iterator[Event]:
    """Run a comparison, and yield what happens; the last event carries the table.

    A stopped comparison continues with the same command: finished methods and shards are kept.

    Args:
        comparison: from `plan_comparison`, without problems.
        work_dir: where journals are kept; the user's cache folder when None.

    Raises:
        PlanRefusedError: the comparison has problems.
        NonFiniteError, StoppedError: as `run_merge`.

    Memory: `Comparison.peak_memory_bytes`.
    """
    comparison.raise_if_refused()
    out = comparison.out
    root = Path(work_dir).expanduser() if work_dir is not None else default_work_dir()
    done = {} if comparison.report_only else _finished(comparison)
    with contextlib.ExitStack() as stack:
        run = _open(comparison, root, done, stack)
        yield Planned(plan=comparison.to_dict())
        reports = dict(done)
        if run.methods:
            plans = {label: comparison.plans[label] for label in run.methods}
            mergers = [method.merger for method in run.methods.values()]
            store = root / f"compare-{target_key(out)}" / "counted.json"
            try:
                yield from counted(list(plans.values()), mergers, reads, store)
                yield from _merge_all(run)
            except NonFiniteError:
                stack.close()
                for label in run.methods:
                    with contextlib.suppress(OSError):
                        discard(out / label)
                raise
            for label, method in run.methods.items():
                reports[label] = _report(run, label, method)
                where = _publish(run, label, method, reports[label])
                yield Published(where=where)
        ordered = {label: reports[label] for label in comparison.plans}
        similarity = run.similarity.table() if not done else None
        files = comparison_files(ordered, similarity, peak=comparison.peak_memory_bytes)
        write_files(out, files)
        table = json.loads(files["comparison.json"])
        yield Finished(where=str(out), report=table, already_there=not run.methods)


def _finished(comparison: Comparison) -> dict[str, Any]:
    """Return the reports of methods that an earlier run finished."""
    return {
        label: read_report(comparison.out / label)
        for label, plan in comparison.plans.items()
        if target_state(comparison.out / label, plan.plan_hash).finished
    }


def _open(
    comparison: Comparison, root: Path, done: Mapping[str, Any], stack: contextlib.ExitStack
) -> _Run:
    first = next(iter(comparison.plans.values()))
    device = choose_device(first.options.device)
    run = _Run(comparison, device, {}, Similarity(list(comparison.plans), len(first.experts)))
    identity = {f"{i} {source.id}": source.identity for i, source in enumerate(first.checkpoints)}
    for label, plan in comparison.plans.items():
        if label in done:
            continue
        sink: Sink
        if comparison.report_only:
            sink = ReportOnlySink(comparison.out / "reports" / f"{label}.json")
        else:
            folder = comparison.out / label
            work = root / f"{plan.plan_hash}-{target_key(folder)}"
            sink = FolderSink(folder, plan.plan_hash, work, identity)
        stack.callback(sink.close)
        run.methods[label] = _Method(sink, Merger(plan, device, run.sample))
    return run


def _merge_all(run: _Run) -> Iterator[Event]:
    first = next(iter(run.comparison.plans.values()))
    for number, shard in enumerate(first.shards):
        kept = {
            label: method.sink.finished_shards().get(shard.name)
            for label, method in run.methods.items()
        }
        missing = [label for label, entry in kept.items() if entry is None]
        made: dict[str, dict[str, Any]] = {}
        if missing:
            made = yield from _merge_shard(run, number, missing)
        for label, method in run.methods.items():
            entry = kept[label] or made[label]
            method.entries += entry["tensors"]
            method.files.append({key: entry[key] for key in ("name", "size", "sha256")})
            yield ShardFinished(
                shard=f"{label}/{shard.name}",
                bytes=shard.nbytes,
                sha256=entry["sha256"] or "",
                resumed=kept[label] is not None,
                shards_done=number + 1,
                shards=len(first.shards),
            )


def _merge_shard(
    run: _Run, number: int, labels: Sequence[str]
) -> Generator[Event, None, dict[str, dict[str, Any]]]:
    """Merge one shard by several methods; the generator's value is their journal entries."""
    shards = {label: run.comparison.plans[label].shards[number] for label in labels}
    entries: dict[str, list[dict[str, Any]]] = {label: [] for label in labels}
    finished: set[str] = set()
    with contextlib.ExitStack() as threads:
        writers: dict[str, ShardWriter] = {}
        queues: dict[str, WriteBehind] = {}
        for label in labels:
            writer = run.methods[label].sink.open_shard(shards[label])
            writers[label] = writer
            threads.callback(_abort_unless, finished, label, writer)
            queues[label] = WriteBehind(WRITE_QUEUE_BYTES)
            threads.callback(queues[label].close)
        for decided in _decided(
            run, labels, [spec.name for spec in shards[labels[0]].tensors], threads
        ):
            for label, entry in _finish(run, decided, writers, queues):
                entries[label].append(entry)
                spec = run.comparison.plans[label].tensors[entry["name"]].spec
                run.methods[label].bytes_written += spec.nbytes
                yield TensorMerged(
                    tensor=f"{label}: {spec.name}",
                    rule=entry["rule"],
                    entry=entry,
                    bytes_read=run.bytes_read,
                    bytes_written=sum(m.bytes_written for m in run.methods.values()),
                )
        made = {}
        for label in labels:
            queues[label].drain()
            sha256 = writers[label].finish()
            finished.add(label)
            shard = shards[label]
            made[label] = {
                "name": shard.name,
                "size": shard.nbytes,
                "sha256": sha256,
                "tensors": entries[label],
            }
            run.methods[label].sink.keep(shard, made[label])
    return made


def _abort_unless(finished: set[str], label: str, writer: ShardWriter) -> None:
    if label not in finished:
        writer.abort()


def _decided(
    run: _Run, labels: Sequence[str], names: Sequence[str], threads: contextlib.ExitStack
) -> Iterator[_Decided]:
    """Yield the pieces in file order, read and decided ahead by threads, all methods together."""
    plans = {label: run.comparison.plans[label] for label in labels}
    reader = Ahead(shared_reads(plans, names, reads), READ_AHEAD_BYTES)
    threads.callback(reader.close)

    def decisions() -> Iterator[tuple[int, Callable[[], tuple[Any, _Decided]]]]:
        for held in reader:
            lead = held.value.lead_piece
            run.bytes_read += sum(len(buffer) for buffer in lead.buffers)

            def decide(held: Any = held) -> tuple[Any, _Decided]:
                return held, _decide(run, held.value)

            yield run.comparison.working_bytes_of(lead.tensor.spec.name), decide

    decider = Ahead(decisions(), run.comparison.working_bytes, workers=workers(run.device))
    threads.callback(decider.close)
    for result in decider:
        held, decided = result.value
        yield decided
        del decided
        held.release()
        result.release()


def _decide(run: _Run, shared: Shared[str]) -> _Decided:
    """Let every method decide about a piece, on the same task vectors."""
    lead = run.methods[shared.lead].merger
    if shared.lead_piece.tensor.rule is None:
        return _Decided(shared, {key: Prepared(piece) for key, piece in shared.pieces.items()})
    prepared, seconds = {}, {}
    try:
        base, vectors = lead.open(shared.lead_piece)
        for label, piece in shared.pieces.items():
            started = time.monotonic()
            prepared[label] = run.methods[label].merger.decide(piece, base, vectors)
            seconds[label] = time.monotonic() - started
    except NonFiniteValues as exc:
        raise lead.non_finite(shared.lead_piece.tensor.spec, exc.source) from exc
    return _Decided(shared, prepared, vectors, seconds)


def _finish(
    run: _Run,
    decided: _Decided,
    writers: Mapping[str, ShardWriter],
    queues: Mapping[str, WriteBehind],
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Write a piece by every method; yield the rows of the reports after a tensor's last one."""
    vectors, prepared = decided.vectors, decided.prepared

    def put(label: str) -> Callable[[memoryview], None]:
        queue, writer = queues[label], writers[label]
        return lambda data: queue.put(len(data), lambda: writer.write(data))

    if vectors is None:
        for label, one in prepared.items():
            entry = run.methods[label].merger.finish(one, put(label))
            if entry is not None:
                yield label, entry
        return
    for label, seconds in decided.seconds.items():
        run.methods[label].seconds += seconds
    writes = {label: put(label) for label in prepared}
    _write_rows(run, decided.shared.lead_piece, vectors, prepared, writes)
    run.sample()
    for label, one in prepared.items():
        entry = run.methods[label].merger.end(one)
        if entry is not None:
            yield label, entry
    vectors.close()


def _write_rows(
    run: _Run,
    piece: Piece,
    vectors: TaskVectors,
    prepared: Mapping[str, Prepared],
    write: Mapping[str, Callable[[memoryview], None]],
) -> None:
    torch.set_num_threads(1)
    for rows in vectors.blocks():
        stack, base = vectors.stack(rows), vectors.base(rows)
        updates: dict[str, Tensor] = {}
        for label, one in prepared.items():
            started = time.monotonic()
            merger = run.methods[label].merger
            updates[label] = merger.write_rows(one, rows, stack, base, write[label])
            run.methods[label].seconds += time.monotonic() - started
        if not vectors.is_zero(rows):
            run.similarity.add(updates, stack)
        piece.release(rows)


def _report(run: _Run, label: str, method: _Method) -> dict[str, Any]:
    return build_report(
        run.comparison.plans[label],
        method.entries,
        method.files,
        environment=environment(run.device),
        seconds=method.seconds,
        bytes_read=run.bytes_read,
        bytes_written=method.bytes_written,
        peak_private_bytes=run.peak_private,
    )


def _publish(run: _Run, label: str, method: _Method, report: dict[str, Any]) -> str:
    if run.comparison.report_only:
        return method.sink.publish({"report.json": (json.dumps(report) + "\n").encode()})
    plan = run.comparison.plans[label]
    return method.sink.publish(plan.side_files() | render_card(plan, report))
