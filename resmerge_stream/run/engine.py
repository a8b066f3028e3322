"""A merge from its plan to its publication: open, count, merge, report, publish; events."""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from ..device import choose_device, give_memory_back, keep_memory_steady
from ..errors import (
    NonFiniteError,
    Remedy,
    ResMergeError,
    SourceChangedError,
    StoppedError,
    listed,
)
from ..hub.patience import MERGING_S, PATIENCE
from ..memory import KEPT_BUFFER_BYTES, KEPT_FACTOR_BYTES
from ..planning.plan import Plan, RefusedPlan
from ..report.card import render_card
from ..report.public_names import PublicNames
from ..sinks.journal import work_folder
from ..sinks.places import keep_places
from ..sinks.provenance import changed
from .counting import counted
from .difference import is_begun, refused_if_equal
from .events import Event, Finished, PartFinished, Planned, Published
from .merging import Merger
from .opening import finished_already, open_sink
from .processes import Processes
from .progress import Peak, Progress
from .shards import Branch, Run, check_sources, merge_shards, report_of


def run_merge(
    plan: Plan | RefusedPlan,
    *,
    out: str | Path | None = None,
    work_dir: str | Path | None = None,
    processes: Processes | None = None,
) -> Iterator[Event]:
    """Run a plan, and yield what happens.

    Closing the generator cancels: finished shards stay for a later run of the same plan, nothing
    half-made has a final name.

    Args:
        plan: from `plan_merge`; it names the repository to publish to, if any.
        out: the output folder, if any.
        work_dir: where journals are kept; the user's cache folder when None.
        processes: the processes that run the plan together; this one alone when None. The main one
            yields what happens in all of them, the others what they do themselves.

    Raises:
        PlanRefusedError: the plan is refused, no expert differs from the base in any value, or the
            sources changed since a first run.
        SourceChangedError: a source changes while it is read; what was merged is removed.
        NonFiniteError: a weight is NaN or infinite, or overflows the output dtype.
        OutputExistsError: somebody else put something there since the plan was made.
        StoppedError: disk, network or permission; the same command continues.

    Memory: `plan.peak_memory_bytes`, whatever the model's size.
    """
    processes = processes or Processes()
    plan = plan.accepted()
    processes.agree(plan)
    folder = Path(os.path.expanduser(out)) if out is not None else None
    done = finished_already(plan, folder) if processes.is_main else None
    planned, is_told = Planned(plan=plan.to_dict()), False
    is_adapter = plan.options.output == "adapter"
    keep_memory_steady(KEPT_FACTOR_BYTES if is_adapter else KEPT_BUFFER_BYTES)
    peak = Peak()
    if processes.is_main and done is None and not is_begun(plan, folder):
        with PATIENCE.of(plan.options.patience or MERGING_S), peak.watched():
            is_told = yield from refused_if_equal(plan, planned)
    if processes.shared("finished", lambda: done is not None):
        yield from () if done is None else (done,)
        return
    device = choose_device(plan.options.device)
    shared = plan.own is not None
    work_dir = work_folder(plan.plan_hash, folder, plan.publication, work_dir, shared=shared)
    membership = processes.membership(plan)
    try:
        with processes.main_first("open"):
            sink = open_sink(plan, folder, work_dir, membership)
    except ResMergeError as exc:
        yield _finished_by_others(plan, folder, exc)
        return
    patience = PATIENCE.of(plan.options.patience or MERGING_S)
    with contextlib.closing(sink), patience, peak.watched():
        try:
            progress = Progress(lambda: sink.bytes_sent, peak=peak)
            if not is_told:
                yield planned
            counts: list[dict[str, Any]] = [{}]
            if plan.method.counting_passes():
                if processes.is_main:
                    counts = yield from counted([plan], device, work_dir / "counted.json")
                counts = processes.shared("counted", partial(list, counts))
            merger = Merger(plan, device, counts[0], peak.look)
            run = Run([Branch(plan, sink, merger)], progress)
            yield from merge_shards(run, processes)
            if not processes.is_main:
                return
            if (ended := _part_ended(plan, run)) is not None:
                yield ended
                return
            give_memory_back()  # report and card need some
            report = report_of(run, run.branches[0], processes)
            files = plan.side_files() | render_card(plan, report, name_private=plan.name_private)
            keep_places(plan.plan_hash, PublicNames(plan, plan.name_private).hidden)
            where = sink.publish(files)
            yield Published(where=where)
            yield Finished(where=where, report=report)
        except ResMergeError as exc:
            error = exc
            with contextlib.suppress(ResMergeError):
                try:
                    # Where the Hub kept failing it was waited for once.
                    check_sources(plan, on_hub=not isinstance(exc, StoppedError))
                except SourceChangedError as moved:
                    error = moved  # the error comes of it
            is_lost = isinstance(error, SourceChangedError) or (
                isinstance(error, NonFiniteError)
                # It is on this disk, so this run can never be finished.
                and not any(source.is_remote for source in plan.checkpoints)
            )
            if processes.is_main and (is_lost or isinstance(error, NonFiniteError)):
                processes.stop_others(error)
            if processes.is_main and is_lost:
                sink.abandon()  # nothing is left behind
            if error is not exc:
                raise error from exc
            yield _finished_by_others(plan, folder, exc)


def _part_ended(plan: Plan, run: Run) -> PartFinished | None:
    """Return the last event of a part that does not publish; None: this run does.

    Raises:
        StoppedError: this run was only to publish, and shards are missing.
    """
    part, missing = plan.options.part, run.unfinished
    if part is None or plan.own is None:
        return None
    if part.number is None and missing:
        raise StoppedError(
            f"nothing is published yet: of {len(plan.shards)} shards {len(missing)} are missing, "
            f"{listed(missing)}.",
            Remedy.RUN_PARTS,
        )
    # Two parts that end together would both open a pull request: that is left to one run alone.
    opens = plan.publication is not None and plan.publication.create_pr
    if missing or (opens and part.number is not None):
        return PartFinished(part=str(part), shards=list(plan.own), missing=missing)
    return None


def _finished_by_others(plan: Plan, out: Path | None, error: ResMergeError) -> Finished:
    """Return the last event of a part that failed since others had finished the merge by then.

    Raises:
        ResMergeError: they had not, so that is what it failed with; or this is no part.
    """
    if plan.own is None:
        raise error
    target = plan.target
    if target is not None:
        from ..sinks.hub.target import look_at_target

        try:
            target = look_at_target(target.publication, plan.plan_hash, plan.token)
        except ResMergeError:
            raise error from None  # the Hub cannot be asked
        if changed(target.report, plan.known):
            raise error
    done = finished_already(replace(plan, target=target), out)
    if done is None:
        raise error
    return done
