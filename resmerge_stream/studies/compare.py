"""Several methods in one pass over the sources: each tensor read once, each SVD done once.

Every method gets its own folder, as `merge` would write it, byte for byte; or only its report.
Beside them stand a table and a picture that set the reports side by side.
"""

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from ..device import choose_device, keep_memory_steady
from ..documents import load_json
from ..errors import NonFiniteError, SourceChangedError
from ..hub.patience import MERGING_S, PATIENCE
from ..maths.cores import Cores
from ..memory import KEPT_BUFFER_BYTES
from ..report.card import render_card
from ..report.public_names import PublicNames
from ..run.counting import counted
from ..run.difference import refused_if_equal
from ..run.events import Event, Finished, Planned, Published
from ..run.merging import Merger
from ..run.opening import read_report
from ..run.pipeline import threads_of
from ..run.processes import Processes
from ..run.progress import Peak, Progress
from ..run.shards import Branch, Run, merge_shards, report_of
from ..sinks import DroppingSink, FolderSink, Sink, target_state
from ..sinks.journal import work_folder
from ..sinks.places import keep_places
from .compare_plan import Comparison
from .compare_report import Similarity, comparison_files, write_files


def run_comparison(
    comparison: Comparison,
    *,
    work_dir: str | Path | None = None,
    sink_of: Callable[[str, Path], Sink] | None = None,
) -> Iterator[Event]:
    """Run a comparison, and yield what happens; the last event carries the table.

    A stopped comparison continues with the same command: finished methods and shards are kept.

    Args:
        comparison: from `plan_comparison`.
        work_dir: where journals are kept; the user's cache folder when None.
        sink_of: where a comparison that writes only reports puts the weights, by method and the
            path of its report; None drops them.

    Raises:
        PlanRefusedError: no expert differs from the base in any value.
        NonFiniteError, SourceChangedError, StoppedError: as `run_merge`.

    Memory: `Comparison.peak_memory_bytes`.
    """
    out, first = comparison.out, comparison.first
    done = {
        label: read_report(out / label)
        for label, plan in comparison.plans.items()
        if not comparison.report_only
        and target_state(out / label, plan.plan_hash, now=plan.known).finished
    }
    planned, is_told = Planned(plan=comparison.to_dict()), False
    keep_memory_steady(KEPT_BUFFER_BYTES)
    peak = Peak()
    if not done:
        with peak.watched():
            is_told = yield from refused_if_equal(first, planned)
    device = choose_device(first.options.device)
    with contextlib.ExitStack() as stack:
        stack.enter_context(PATIENCE.of(first.options.patience or MERGING_S))
        stack.enter_context(peak.watched())
        sinks = _open(
            comparison, work_dir, done, stack, sink_of or (lambda _, path: DroppingSink(path))
        )
        if not is_told:
            yield planned
        reports, similarity = dict(done), earlier_similarity(comparison)
        if sinks:
            progress = Progress(lambda: 0, peak=peak)
            plans = [comparison.plans[label] for label in sinks]
            store = work_folder("compare", out, None, work_dir) / "counted.json"
            try:
                found = yield from counted(plans, device, store)
                cores = Cores(threads_of(plans[0]))
                branches = [
                    Branch(plan, sink, Merger(plan, device, counts, peak.look, cores),
                           label)
                    for plan, (label, sink), counts in zip(plans, sinks.items(), found, strict=True)
                ]  # fmt: skip
                run = Run(branches, progress, partial(Similarity, experts=len(first.experts)))
                yield from merge_shards(run, Processes())
            except (NonFiniteError, SourceChangedError):
                for sink in sinks.values():
                    sink.abandon()
                raise
            if not done:
                total = Similarity([branch.label for branch in run.branches], len(run.plan.experts))
                for shard in run.plan.shards:
                    total.include(run.branches[0].seen[shard.name])
                similarity = total.table()
            for branch in branches:
                report = reports[branch.label] = report_of(run, branch, Processes())
                if comparison.report_only:
                    files = {"report.json": (json.dumps(report) + "\n").encode()}
                else:
                    files = branch.plan.side_files() | render_card(branch.plan, report)
                    names = PublicNames(branch.plan, name_private=False)
                    keep_places(branch.plan.plan_hash, names.hidden)
                yield Published(where=branch.sink.publish(files))
        ordered = {label: reports[label] for label in comparison.plans}
        files = comparison_files(ordered, similarity, peak=comparison.peak_memory_bytes)
        write_files(out, files)
        table = json.loads(files["comparison.json"])
        yield Finished(where=str(out), report=table, already_there=not sinks)


def earlier_similarity(comparison: Comparison) -> dict[str, Any] | None:
    """Return the likeness of the updates from the table of an earlier run of this comparison."""
    try:
        table = load_json((comparison.out / "comparison.json").read_bytes())
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
    sink_of: Callable[[str, Path], Sink],
) -> dict[str, Sink]:
    """Open the target of every method that no earlier run finished."""
    sinks: dict[str, Sink] = {}
    for label, plan in comparison.plans.items():
        if label in done:
            continue
        sink: Sink
        if comparison.report_only:
            sink = sink_of(label, comparison.out / "reports" / f"{label}.json")
        else:
            folder = comparison.out / label
            work = work_folder(plan.plan_hash, folder, None, work_dir)
            sink = FolderSink(
                folder, plan.plan_hash, work, plan.identity, now=plan.known, update=plan.update
            ).open()
        stack.callback(sink.close)
        sinks[label] = sink
    return sinks
