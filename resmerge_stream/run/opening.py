"""Opening a merge's target: a folder, a repository, or both; and what is found there first."""

import contextlib
import itertools
import json
import os
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import PlanRefusedError, RecipeError, Remedy
from ..planning.plan import Plan
from ..report.schema import parse_report
from ..sinks import FolderSink, Sink, target_state
from ..sinks.folder import REPORT, discard
from ..sinks.journal import discard_work, machine_folder
from ..sinks.locks import HeldError
from ..sinks.publication import Publication
from ..sinks.sink import Membership
from .events import Finished

if TYPE_CHECKING:
    from ..sinks.hub.sink import HubSink
    from ..sinks.hub.target import HubTarget


def finished_already(plan: Plan, out: Path | None) -> Finished | None:
    """Return the last event of a merge that an earlier run finished, or None.

    What such a run had no time for on the Hub (visibility, tidying) is done now.
    """
    on_hub = plan.target is not None and plan.target.finished
    in_folder = out is not None and target_state(out, plan.plan_hash, now=plan.known).finished
    if plan.target is not None and on_hub:
        from ..sinks.hub.sink import finish_target

        target = plan.target
        data = json.dumps(target.report).encode()  # anybody may have written it
        report = parse_report(data, where=f"{target.repo.id}/{REPORT}")
        finish_target(target, plan.plan_hash, report)
        if out is None or in_folder:
            return Finished(where=target.page, report=report, already_there=True)
    if plan.publication is None and out is not None and in_folder:
        return Finished(where=str(out), report=read_report(out), already_there=True)
    return None


def open_sink(plan: Plan, out: Path | None, work: Path, membership: Membership) -> Sink:
    """Return where a plan is written to.

    Args:
        plan: what is written.
        out: the output folder, if any.
        work: the folder of this plan and target, for journal, lock and unsent shards.
        membership: as what this process of the run comes.

    Raises:
        RecipeError: there is no target at all.
        OutputExistsError: something else stands at the target.
        PlanRefusedError: the sources changed since a first run.
        StoppedError: another process runs this merge, or the disk or the Hub fails.
    """
    target = plan.target
    if target is None or target.finished:
        if out is None:
            raise RecipeError("nowhere to write.", Remedy.GIVE_TARGET)
        return FolderSink(
            out,
            plan.plan_hash,
            work,
            plan.identity,
            membership,
            now=plan.known,
            update=plan.update,
        ).open()
    if out is not None and target_state(out, plan.plan_hash, now=plan.known).finished:
        raise PlanRefusedError(
            f"{str(out)!r} already holds this merge, but {target.repo.id} does not.",
            Remedy.ONLY_PUBLISH,
        )
    if membership.own is None:
        return _hub_sink(plan, target, out, work, membership).open()
    # A folder of its own for what waits to be sent: other parts may run on this machine too, or
    # on others that share the cache. The first that nobody uses may hold what a killed one left.
    for number in itertools.count():
        own = work / f"{socket.gethostname()}-{number}"
        with contextlib.suppress(HeldError):
            return _hub_sink(plan, target, None, own, membership).open()
    raise AssertionError


def _hub_sink(
    plan: Plan, target: "HubTarget", out: Path | None, work: Path, membership: Membership
) -> "HubSink":
    from ..sinks.hub.sink import HubSink

    has_folders = any(source.folder is not None for source in plan.checkpoints)
    shelf = FolderSink(
        out or work / "shards",
        plan.plan_hash,
        work,
        plan.identity,
        membership if membership.own is None else None,
        one_machine=out is None,
        now=plan.known,
        update=plan.update,
    )
    return HubSink(
        target,
        plan.plan_hash,
        plan.shards,
        shelf,
        keep_files=out is not None,
        identity=plan.identity,
        membership=membership,
        # What somebody without the recipe needs to continue; folders would mean nothing to them.
        asked=None if plan.publication is None or has_folders else plan.request.to_dict(),
    )


def discard_unfinished(
    out: str | None, publication: Publication | None, work_dir: str | Path | None = None
) -> list[str]:
    """Remove what unfinished merges left at a target and on this machine; return what it was.

    Raises:
        ResMergeError: there is nothing that a merge left, or the Hub refuses.
    """
    folder = Path(os.path.expanduser(out)) if out is not None else None
    removed = discard_work(machine_folder("", folder, publication, work_dir))
    if publication is not None:
        from ..sinks.hub.leftovers import discard_staging

        removed += discard_staging(publication.repo_id, None, create_pr=publication.create_pr)
    if folder is not None:
        removed += discard(folder)
    return removed


def read_report(out: Path) -> dict[str, Any]:
    """Return the report of a finished output folder.

    Raises:
        VerificationError: what stands there is not a report.
    """
    return parse_report((out / REPORT).read_bytes(), where=str(out / REPORT))
