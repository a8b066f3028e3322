"""One shard of every method at once: read, decided on shared task vectors, written side by side."""

import contextlib
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..device import private_memory, usable_cores
from ..maths.cores import Cores
from ..maths.rounding import Kept
from ..maths.task_vectors import TaskVectors
from ..memory import WRITE_QUEUE_BYTES
from ..pipes import WriteBehind
from ..report.rows import Rows
from ..run.events import Event, TensorMerged
from ..run.merging import Decided, MergedRows, Merger, reported
from ..run.pieces import Assembly
from ..run.pipeline import blocks_ahead, worked_ahead, workers
from ..run.reading import READ_AHEAD_BYTES, reads
from ..run.sharing import Shared, shared_reads
from ..sinks import ShardWriter, Sink
from .compare_plan import Comparison
from .compare_report import Similarity


@dataclass(slots=True)
class Method:
    """What is known of one method while the comparison runs.

    Attributes:
        sink, merger: its own.
        seconds: spent on its decisions and rows, added up over the threads.
        bytes_written, entries, files: so far.
    """

    sink: Sink
    merger: Merger
    seconds: float = 0.0
    bytes_written: int = 0
    entries: list[dict[str, Any]] = field(default_factory=list)
    files: list[dict[str, Any]] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, seconds: float) -> None:
        """Add what a thread spent on this method."""
        with self._lock:
            self.seconds += seconds


@dataclass(slots=True)
class Run:
    """A comparison that is under way. Its methods share `cores`."""

    comparison: Comparison
    device: torch.device
    methods: dict[str, Method]
    similarity: Similarity
    cores: Cores = field(default_factory=lambda: Cores(usable_cores()))
    started: float = field(default_factory=time.monotonic)
    bytes_read: int = 0
    peak_private: int = 0

    def sample(self) -> None:
        """Take note of the memory in use."""
        self.peak_private = max(self.peak_private, private_memory())


@dataclass(frozen=True, slots=True)
class _Decided:
    """A piece with every method's decision.

    Attributes:
        shared: as read.
        vectors: the task vectors that all methods share.
        by_label: the decisions.
    """

    shared: Shared[str]
    vectors: TaskVectors
    by_label: dict[str, Decided]


@dataclass(frozen=True, slots=True)
class _Rows:
    """A row block as every method merged it.

    Attributes:
        merged: by label.
        seconds: that each took.
        products: for the likeness of the updates; None where some methods saw another cut.
        is_zero: whether no expert changed anything here.
    """

    merged: dict[str, MergedRows]
    seconds: dict[str, float]
    products: Tensor | None
    is_zero: bool


def merge_shard(
    run: Run, number: int, labels: Sequence[str]
) -> Generator[Event, None, dict[str, dict[str, Any]]]:
    """Merge one shard by several methods; the generator's value is their journal entries."""
    shards = {label: run.comparison.plans[label].shards[number] for label in labels}
    entries: dict[str, list[dict[str, Any]]] = {label: [] for label in labels}
    similarity = Similarity(list(labels), len(run.comparison.first.experts))
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
        write = {label: Assembly(_writing(queues[label], writers[label])) for label in labels}
        rows = {label: Rows(len(run.comparison.first.experts)) for label in labels}
        names = [spec.name for spec in shards[labels[0]].tensors]
        chain = threads.enter_context(contextlib.closing(_decided(run, labels, names)))
        for done in chain:
            if done is None:
                continue
            for label, entry in _finish(run, done, rows, write, similarity):
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
                "similarity": similarity.to_dict(),
            }
            run.methods[label].sink.keep(shard, made[label])
    return made


def _writing(queue: WriteBehind, writer: ShardWriter) -> Callable[[memoryview], None]:
    return lambda data: queue.put(len(data), lambda: writer.write(data))


def _abort_unless(finished: set[str], label: str, writer: ShardWriter) -> None:
    if label not in finished:
        writer.abort()


def _decided(
    run: Run, labels: Sequence[str], names: Sequence[str]
) -> Generator[Shared[str] | _Decided | None, None, None]:
    """Yield the pieces in file order, read and decided ahead by threads, all methods together.

    What is carried through comes as it was read.
    """
    plans = {label: run.comparison.plans[label] for label in labels}

    def read(nbytes: int) -> None:
        run.bytes_read += nbytes

    return worked_ahead(
        shared_reads(plans, names, reads),
        lambda shared: _decide(run, shared),
        read_bytes=run.comparison.first.read_ahead_bytes or READ_AHEAD_BYTES,
        work_bytes=run.comparison.working_bytes,
        cost=lambda shared: run.comparison.working_bytes_of(shared.lead_piece.tensor.spec.name),
        workers=workers(run.device),
        cores=run.cores,
        on_read=read,
    )


def _decide(run: Run, shared: Shared[str]) -> Shared[str] | _Decided:
    """Let every method decide about a piece, on the same task vectors."""
    lead, piece = run.methods[shared.lead].merger, shared.lead_piece
    if piece.tensor.rule is None:
        return shared
    decided = {}
    with lead.naming(piece.tensor):
        base, vectors = lead.open(piece)
        for label, own in shared.pieces.items():
            if own.tensor.rule is not None:
                started = time.monotonic()
                method = run.methods[label]
                decided[label] = method.merger.decide(own, own.tensor.rule, base, vectors)
                method.add(time.monotonic() - started)
    return _Decided(shared, vectors, decided)


def _finish(
    run: Run,
    done: Shared[str] | _Decided,
    rows: Mapping[str, Rows],
    write: Mapping[str, Assembly],
    similarity: Similarity,
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Write a piece by every method; yield the rows of the reports after a tensor's last one."""
    if isinstance(done, Shared):
        for label, piece in done.pieces.items():
            write[label].of(piece)(piece.layout_bytes)
            entry = rows[label].carried(piece.tensor, is_last=piece.is_last)
            if entry is not None:
                yield label, entry
        return
    kept = _write_rows(run, done, write, similarity)
    run.sample()
    for label, decided in done.by_label.items():
        entry = reported(rows[label], decided, kept[label])
        if entry is not None:
            yield label, entry
    done.vectors.close()


def _write_rows(
    run: Run,
    done: _Decided,
    write: Mapping[str, Assembly],
    similarity: Similarity,
) -> dict[str, Kept]:
    """Write a piece by every method, its row blocks merged ahead; return what the casts kept."""
    vectors, piece = done.vectors, done.shared.lead_piece
    kept = {label: Kept() for label in done.by_label}
    takers = {label: write[label].of(done.shared.pieces[label]) for label in done.by_label}

    def merge(block: slice) -> _Rows:
        stack, base = vectors.block(block)
        merged, seconds, updates = {}, {}, {}
        for label, decided in done.by_label.items():
            started = time.monotonic()
            updates[label] = decided.update.rows(block, stack)
            merger = run.methods[label].merger
            merged[label] = merger.merge_rows(decided, block, updates[label], base)
            seconds[label] = time.monotonic() - started
        is_zero = vectors.is_zero(block)
        products = None if is_zero else similarity.products(updates, stack)
        return _Rows(merged, seconds, products, is_zero)

    threads = usable_cores() if run.device.type == "cpu" else 1
    with (
        run.methods[done.shared.lead].merger.naming(piece.tensor),
        contextlib.closing(blocks_ahead(vectors.blocks(), merge, threads)) as blocks,
    ):
        for block, rows in blocks:
            for label, merged in rows.merged.items():
                kept[label].absorb(merged.kept)
                takers[label](merged.data)
                run.methods[label].add(rows.seconds[label])
            if not rows.is_zero:
                similarity.add(rows.products, piece.tensor.experts)
            piece.release(block)
    return kept
