"""A plan's target: what stands there, whether it fits, what earlier starts pinned. No torch."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..device import free_disk, machine_share
from ..errors import Findings, Remedy, listed, shown
from ..methods import MERGEKITS
from ..sinks import target_state
from ..sinks.journal import known_commits, work_folder
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
    here = work_folder(plan.plan_hash, out, plan.publication, work_dir)
    return commits or known_commits(here, plan.plan_hash)


def check_folder(plan: Plan, out: Path, found: Findings) -> None:
    """Refuse an output folder that holds something else, or whose disk is too small."""
    if "\x00" in str(out) or len(out.name.encode()) > 255:
        found.problem(f"{shown(str(out))} cannot be a folder's name.", Remedy.ANOTHER_FOLDER)
        return
    state = target_state(out, plan.plan_hash)
    if state.problem is not None:
        found.problem(state.problem)
        return
    needed = plan.write_bytes - state.bytes_there
    free = free_disk(out)
    if needed > free:
        found.problem(
            f"the output takes {format_size(needed)} more, but the disk of {str(out)!r} has "
            f"{format_size(free)} free. Free some.",
            Remedy.ANOTHER_FOLDER,
            kind="disk",
        )


def check_publication(
    plan: Plan,
    target: "HubTarget",
    out: Path | None,
    work_dir: str | Path | None,
    found: Findings,
) -> None:
    """Check what only a plan can tell of a repository: time, storage, disk, names, card."""
    from ..sinks.hub import target as hub_target

    if target.finished or target.found.problems:
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
    if out is None:
        _check_work_disk(plan, largest, work_dir, found)


def _check_work_disk(
    plan: Plan,
    largest: int,
    work_dir: str | Path | None,
    found: Findings,
) -> None:
    """Refuse a disk too small for the shards that wait on it: one for each process, if any."""
    folder = work_folder(plan.plan_hash, None, plan.publication, work_dir)
    free = plan.machine.disk_bytes if plan.machine is not None else free_disk(folder)
    sharing = machine_share()[1] if plan.machine is None else 1
    needed = min(largest * sharing, plan.peak_disk_bytes)
    if needed > free:
        found.problem(
            f"shards of {format_size(largest)} wait on the disk of {str(folder)!r} before they are "
            f"sent, but it has {format_size(free)} free.",
            Remedy.SMALLER_SHARDS,
            Remedy.ANOTHER_WORK_DIR,
            Remedy.NO_DISK,
            kind="disk",
        )
