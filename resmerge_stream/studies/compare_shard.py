"""One shard of every method at once: read, decided on shared task vectors, written side by side."""

import contextlib
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..device import private_memory
from ..maths.task_vectors import NonFiniteValues, TaskVectors
from ..memory import WRITE_QUEUE_BYTES
from ..pipes import Ahead, WriteBehind
from ..run.engine import workers
from ..run.events import Event, TensorMerged
from ..run.merging import Merger, Prepared
from ..run.reading import READ_AHEAD_BYTES, reads
from ..run.sharing import Shared, shared_reads
from ..sinks import ShardWriter, Sink
from .compare_plan import Comparison
from .compare_report import Similarity


@dataclass(slots=True)
class Method:
    """What is known of one method while the comparison runs."""

    sink: Sink
    merger: Merger
    seconds: float = 0.0
    bytes_written: int = 0
    entries: list[dict[str, Any]] = field(default_factory=list)
    files: list[dict[str, Any]] = field(default_factory=list)


@dataclass(slots=True)
class Run:
    """A comparison that is under way."""

    comparison: Comparison
    device: torch.device
    methods: dict[str, Method]
    similarity: Similarity
    started: float = field(default_factory=time.monotonic)
    bytes_read: int = 0
    peak_private: int = 0

    def sample(self) -> None:
        """Take note of the memory in use."""
        self.peak_private = max(self.peak_private, private_memory())


@dataclass(frozen=True, slots=True)
class _Decided:
    """A piece with every method's decision and what each took; no vectors if carried through."""

    shared: Shared[str]
    prepared: dict[str, Prepared]
    vectors: TaskVectors | None = None
    seconds: dict[str, float] = field(default_factory=dict)


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
        for decided in _decided(
            run, labels, [spec.name for spec in shards[labels[0]].tensors], threads
        ):
            for label, entry in _finish(run, decided, writers, queues, similarity):
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


def _abort_unless(finished: set[str], label: str, writer: ShardWriter) -> None:
    if label not in finished:
        writer.abort()


def _decided(
    run: Run, labels: Sequence[str], names: Sequence[str], threads: contextlib.ExitStack
) -> Iterator[_Decided]:
    """Yield the pieces in file order, read and decided ahead by threads, all methods together."""
    plans = {label: run.comparison.plans[label] for label in labels}
    limit = run.comparison.first.read_ahead_bytes or READ_AHEAD_BYTES
    reader = Ahead(shared_reads(plans, names, reads), limit)

    def decisions() -> Iterator[tuple[int, Callable[[], tuple[Any, _Decided]]]]:
        for held in reader:
            lead = held.value.lead_piece
            run.bytes_read += sum(len(buffer) for buffer in lead.buffers)

            def decide(held: Any = held) -> tuple[Any, _Decided]:
                return held, _decide(run, held.value)

            yield run.comparison.working_bytes_of(lead.tensor.spec.name), decide

    decider = Ahead(decisions(), run.comparison.working_bytes, workers=workers(run.device))
    threads.callback(decider.close)
    threads.callback(reader.close)  # before the decider, which may be waiting for it
    for result in decider:
        held, decided = result.value
        yield decided
        decided.shared.lead_piece.close()
        del decided
        held.release()
        result.release()


def _decide(run: Run, shared: Shared[str]) -> _Decided:
    """Let every method decide about a piece, on the same task vectors."""
    lead = run.methods[shared.lead].merger
    if shared.lead_piece.tensor.rule is None:
        carried = {key: run.methods[key].merger.prepare(p) for key, p in shared.pieces.items()}
        return _Decided(shared, carried)
    prepared, seconds = {}, {}
    try:
        base, vectors = lead.open(shared.lead_piece)
        for label, piece in shared.pieces.items():
            started = time.monotonic()
            prepared[label] = run.methods[label].merger.decide(piece, base, vectors)
            seconds[label] = time.monotonic() - started
    except NonFiniteValues as exc:
        raise lead.non_finite(shared.lead_piece.tensor, exc.source) from exc
    return _Decided(shared, prepared, vectors, seconds)


def _finish(
    run: Run,
    decided: _Decided,
    writers: Mapping[str, ShardWriter],
    queues: Mapping[str, WriteBehind],
    similarity: Similarity,
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
    _write_rows(run, decided, vectors, writes, similarity)
    run.sample()
    for label, one in prepared.items():
        entry = run.methods[label].merger.end(one)
        if entry is not None:
            yield label, entry
    vectors.close()


def _write_rows(
    run: Run,
    decided: _Decided,
    vectors: TaskVectors,
    write: Mapping[str, Callable[[memoryview], None]],
    similarity: Similarity,
) -> None:
    torch.set_num_threads(1)
    for rows in vectors.blocks():
        stack, base = vectors.stack(rows), vectors.base(rows)
        updates: dict[str, Tensor] = {}
        for label, one in decided.prepared.items():
            started = time.monotonic()
            merger = run.methods[label].merger
            merged = merger.merge_rows(one, rows, stack, base)
            one.kept.absorb(merged.kept)
            write[label](merged.data)
            updates[label] = merged.delta
            run.methods[label].seconds += time.monotonic() - started
        if not vectors.is_zero(rows):
            similarity.add(updates, stack, decided.shared.lead_piece.tensor.experts)
        decided.shared.lead_piece.release(rows)
