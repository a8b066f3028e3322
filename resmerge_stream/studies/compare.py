"""Several methods in one pass over the sources: each tensor read once, each SVD done once.

Every method gets its own folder, as `merge` would write it, byte for byte; or only its report.
Beside them stand a table and a picture that set the reports side by side.
"""

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..device import choose_device, keep_memory_steady
from ..errors import NonFiniteError
from ..memory import KEPT_BUFFER_BYTES
from ..report.build import build_report
from ..report.card import render_card
from ..run.counting import counted
from ..run.difference import refused_if_equal
from ..run.engine import environment
from ..run.events import Event, Finished, Planned, Published, ShardFinished
from ..run.merging import Merger
from ..run.opening import read_report
from ..run.reading import reading_ahead_of
from ..run.sharing import shared_order
from ..sinks import FolderSink, Sink, target_state
from ..sinks.folder import discard
from ..sinks.journal import work_folder
from ..sinks.report_only import ReportOnlySink
from .compare_plan import Comparison
from .compare_report import Similarity, comparison_files, write_files
from .compare_shard import Method, Run, merge_shard


def run_comparison(
    comparison: Comparison, *, work_dir: str | Path | None = None
) -> Iterator[Event]:
    """Run a comparison, and yield what happens; the last event carries the table.

    A stopped comparison continues with the same command: finished methods and shards are kept.

    Args:
        comparison: from `plan_comparison`.
        work_dir: where journals are kept; the user's cache folder when None.

    Raises:
        PlanRefusedError: no expert differs from the base in any value.
        NonFiniteError, StoppedError: as `run_merge`.

    Memory: `Comparison.peak_memory_bytes`.
    """
    out = comparison.out
    done = {} if comparison.report_only else _finished(comparison)
    planned, is_told = Planned(plan=comparison.to_dict()), False
    if not done:
        is_told = yield from refused_if_equal(comparison.first, planned)
    with contextlib.ExitStack() as stack:
        sinks = _open(comparison, work_dir, done, stack)
        run = _run_of(comparison)
        if not is_told:
            yield planned
        reports = dict(done)
        if sinks:
            plans = [comparison.plans[label] for label in sinks]
            store = work_folder("compare", out, None, work_dir) / "counted.json"
            try:
                found = yield from counted(plans, run.device, store)
                for (label, sink), counts in zip(sinks.items(), found, strict=True):
                    merger = Merger(
                        comparison.plans[label], run.device, counts, run.sample, run.cores
                    )
                    run.methods[label] = Method(sink, merger)
                yield from _merge_all(run)
            except NonFiniteError:
                stack.close()
                for label in sinks:
                    with contextlib.suppress(OSError):
                        discard(out / label)
                raise
            for label, method in run.methods.items():
                reports[label] = _report(run, label, method)
                where = _publish(run, label, method, reports[label])
                yield Published(where=where)
        ordered = {label: reports[label] for label in comparison.plans}
        similarity = run.similarity.table() if not done else _earlier(comparison)
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


def _earlier(comparison: Comparison) -> dict[str, Any] | None:
    """Return the likeness of the updates from the table of an earlier run of this comparison."""
    try:
        table = json.loads((comparison.out / "comparison.json").read_text(encoding="utf-8"))
        labels = [row["label"] for row in table["methods"]]
        found: dict[str, Any] | None = table["similarity"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return found if labels == list(comparison.plans) else None


def _open(
    comparison: Comparison,
    work_dir: str | Path | None,
    done: Mapping[str, Any],
    stack: contextlib.ExitStack,
) -> dict[str, Sink]:
    """Open the target of every method that no earlier run finished."""
    sinks: dict[str, Sink] = {}
    for label, plan in comparison.plans.items():
        if label in done:
            continue
        sink: Sink
        if comparison.report_only:
            sink = ReportOnlySink(comparison.out / "reports" / f"{label}.json")
        else:
            folder = comparison.out / label
            work = work_folder(plan.plan_hash, folder, None, work_dir)
            sink = FolderSink(folder, plan.plan_hash, work, plan.identity).open()
        stack.callback(sink.close)
        sinks[label] = sink
    return sinks


def _run_of(comparison: Comparison) -> Run:
    first = comparison.first
    similarity = Similarity(list(comparison.plans), len(first.experts))
    keep_memory_steady(KEPT_BUFFER_BYTES)
    return Run(comparison, choose_device(first.options.device), {}, similarity)


def _merge_all(run: Run) -> Iterator[Event]:
    """Merge every shard that some method lacks, reading ahead of the arithmetic."""
    missing = [
        [
            label
            for label, method in run.methods.items()
            if shard.name not in method.sink.finished_shards()
        ]
        for shard in run.comparison.first.shards
    ]
    order = (
        tensor
        for shard, labels in zip(run.comparison.first.shards, missing, strict=True)
        for tensor in shared_order(
            {label: run.comparison.plans[label] for label in labels},
            [spec.name for spec in shard.tensors],
        )
    )
    with reading_ahead_of(run.comparison.first, order):
        yield from _shards(run)


def _shards(run: Run) -> Iterator[Event]:
    first = run.comparison.first
    for number, shard in enumerate(first.shards):
        kept = {
            label: method.sink.finished_shards().get(shard.name)
            for label, method in run.methods.items()
        }
        missing = [label for label, entry in kept.items() if entry is None]
        made: dict[str, dict[str, Any]] = {}
        if missing:
            made = yield from merge_shard(run, number, missing)
        entries = {label: kept[label] or made[label] for label in run.methods}
        run.similarity.include(next(iter(entries.values())).get("similarity"))
        for label, method in run.methods.items():
            entry = entries[label]
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


def _report(run: Run, label: str, method: Method) -> dict[str, Any]:
    return build_report(
        run.comparison.plans[label],
        method.merger.counted,
        method.entries,
        method.files,
        environment=environment(run.device),
        seconds=method.seconds,
        bytes_read=run.bytes_read,
        bytes_written=method.bytes_written,
        peak_private_bytes=run.peak_private,
    )


def _publish(run: Run, label: str, method: Method, report: dict[str, Any]) -> str:
    if run.comparison.report_only:
        return method.sink.publish({"report.json": (json.dumps(report) + "\n").encode()})
    plan = run.comparison.plans[label]
    return method.sink.publish(plan.side_files() | render_card(plan, report))
