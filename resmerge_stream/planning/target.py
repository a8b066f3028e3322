"""A plan's target: what stands there, whether it fits, what earlier starts pinned. No torch."""

import os
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..device import free_disk, machine_share
from ..errors import Findings, Remedy, ResMergeError, listed, shown
from ..methods import MERGEKITS
from ..sinks import target_state
from ..sinks.journal import known_commits, work_folder
from ..sinks.locks import keeps_locks
from ..units import format_size
from .planned import Draft, Plan

if TYPE_CHECKING:
    from ..sinks.hub.target import HubTarget


def look_at_repository(plan: Draft, found: Findings) -> Draft:
    """Ask the Hub what stands where the merge is to be published, if it is."""
    if plan.publication is None:
        return plan
    from ..sinks.hub.target import look_at_target

    target = look_at_target(plan.publication, plan.plan_hash, plan.token)
    found.problems += target.found.problems
    return replace(plan, target=target)


def pinned_commits(plan: Draft, out: Path | None, work_dir: str | Path | None) -> list[str | None]:
    """Return the commits that an earlier start pinned the sources to; those win over any branch."""
    staged = plan.target.staged if plan.target is not None else None
    commits = staged.commits if staged is not None else []
    shared = plan.options.part is not None
    here = work_folder(plan.plan_hash, out, plan.publication, work_dir, shared=shared)
    return commits or known_commits(here, plan.plan_hash)


def is_name(folder: Path) -> bool:
    """Return whether a folder can be called so: text of a length that file systems take."""
    try:
        return b"\x00" not in str(folder).encode() and len(folder.name.encode()) <= 255
    except UnicodeEncodeError:
        return False  # bytes of a shell that are no text


def check_folder(plan: Plan, out: Path, work_dir: str | Path | None, found: Findings) -> None:
    """Refuse an output folder that holds something else, or cannot take the output."""
    if not is_name(out):
        found.problem(f"{shown(str(out))} cannot be a folder's name.", Remedy.ANOTHER_FOLDER)
        return
    state = target_state(out, plan.plan_hash, now=plan.known, update=plan.update)
    if state.problem is not None:
        found.problem(state.problem)
    if state.problem is not None or state.finished:
        return
    _check_writable(out, Remedy.ANOTHER_FOLDER, found)
    shared = plan.own is not None
    work = work_folder(plan.plan_hash, out, plan.publication, work_dir, shared=shared)
    _check_writable(work, Remedy.ANOTHER_WORK_DIR, found)
    if not shared and not keeps_locks(out):
        found.warning(
            f"the file system of {str(out)!r} keeps no locks: a second run that begins there "
            "before this one is done is not refused, but stops this one",
            kind="no-locks",
        )
    needed = plan.write_bytes - state.bytes_there
    free = free_disk(out)
    if needed > free:
        found.problem(
            f"the output takes {format_size(needed)} more, but the disk of {str(out)!r} has "
            f"{format_size(free)} free. Free some.",
            Remedy.ANOTHER_FOLDER,
            kind="disk",
        )


def check_cache(plan: Plan, found: Findings) -> None:
    """Refuse a cache of the Hub's client that cannot take the small files that are copied last."""
    if plan.machine is not None or all(source.folder is not None for source in plan.checkpoints):
        return
    from ..hub.client import cache_folder

    refused = Findings()
    _check_writable(cache_folder(), Remedy.ANOTHER_CACHE, refused)
    if refused.problems:
        try:
            plan.side_files()  # nothing is written where all of them are there
        except ResMergeError:
            found.problems += refused.problems


def check_publication(
    plan: Plan,
    target: "HubTarget",
    out: Path | None,
    work_dir: str | Path | None,
    found: Findings,
) -> None:
    """Check what only a plan can tell of a repository: time, storage, disk, names, card."""
    from ..sinks.hub import target as hub_target

    if target.finished:
        hub_target.check_current(target, plan.plan_hash, plan.known)
    if target.finished or target.found.problems:
        found.problems += [p for p in target.found.problems if p not in found.problems]
        return
    largest = max((shard.nbytes for shard in plan.shards), default=0)
    hub_target.check_fit(
        target, plan.write_bytes, largest, plan.seconds_estimate, machine_share()[1]
    )
    private = sorted(
        {s.id for s in plan.checkpoints if s.folder is None and (s.is_private or s.gated)}
    )
    if private and target.ends_public:
        does = "names" if plan.name_private else "does not name"
        found.warning(
            f"the public card {does} private or gated models: {listed(private)}",
            *([] if plan.name_private else [Remedy.NAME_PRIVATE]),
        )
    if target.publication.update or target.publication.create_pr:
        what = "the pull request" if target.publication.create_pr else "the merge"
        written = [
            *(shard.name for shard in plan.shards),
            *hub_target.CARD_FILES,
            *([hub_target.MERGEKIT_CONFIG] if plan.recipe.method in MERGEKITS else []),
            *plan.side_files(),
        ]
        replaced, stale = hub_target.replaced_files(target, written)
        if replaced:
            found.warning(f"{what} replaces in {target.repo.id}: {', '.join(replaced)}")
        if stale:
            found.warning(f"{what} removes from {target.repo.id}: {', '.join(stale)}")
    card = hub_target.card_problem(target, [(s.id, s.license) for s in plan.checkpoints])
    found.problems += target.found.problems
    found.warnings += target.found.warnings
    if card:
        found.problem(card)
    if out is not None:
        return
    # The shards that wait on the disk: one for each process, if any.
    folder = work_folder(plan.plan_hash, None, plan.publication, work_dir)
    if plan.machine is None:
        _check_writable(folder, Remedy.ANOTHER_WORK_DIR, found)
    free = plan.machine.disk_bytes if plan.machine is not None else free_disk(folder)
    sharing = machine_share()[1] if plan.machine is None else 1
    if min(largest * sharing, plan.peak_disk_bytes) > free:
        found.problem(
            f"shards of {format_size(largest)} wait on the disk of {str(folder)!r} before they are "
            f"sent, but it has {format_size(free)} free.",
            Remedy.SMALLER_SHARDS,
            Remedy.ANOTHER_WORK_DIR,
            Remedy.NO_DISK,
            kind="disk",
        )


def _check_writable(folder: Path, remedy: Remedy, found: Findings) -> None:
    """Refuse a folder in which, or in whose place, no file can be made."""
    there = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
    try:
        with tempfile.TemporaryFile(dir=there):  # without a name, where the system can
            return
    except OSError as exc:
        text = f"nothing can be written to {str(folder)!r}: {exc.strerror}."
        found.problem(text, remedy, kind="not-writable")
