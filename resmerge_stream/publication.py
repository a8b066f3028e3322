"""Publishing, as the user asked for it: where to, for whom, over what. No network."""

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

from .device import default_work_dir
from .errors import RecipeError
from .sources import REPO_ID


@dataclass(frozen=True, kw_only=True, slots=True)
class Publication:
    """A repository as target of a merge.

    Attributes:
        repo_id: ``namespace/name``.
        public: what to make it at the very end; None leaves an existing repository as it is and
            a new one private.
        update: whether a model that stands there may be replaced.
        max_disk: bytes of weights that may be on this machine at a time; 0 sends them without
            any file, None allows two shards.
    """

    repo_id: str
    public: bool | None = None
    update: bool = False
    max_disk: int | None = None

    def __post_init__(self) -> None:
        if not REPO_ID.fullmatch(self.repo_id):
            raise RecipeError(
                f"--push-to {self.repo_id!r} is not a repository id. Write namespace/name."
            )


def work_folder(
    plan_hash: str,
    out: Path | None,
    publication: Publication | None,
    work_dir: str | Path | None,
) -> Path:
    """Return the folder of one plan and target on this machine: journal, lock, unsent shards.

    Args:
        plan_hash: of the plan.
        out: the output folder, where there is one.
        publication: the repository, where there is one.
        work_dir: where such folders are kept; the user's cache folder when None.
    """
    root = Path(os.path.expanduser(work_dir)) if work_dir is not None else default_work_dir()
    target = str(out.resolve()) if out is not None else ""
    if publication is not None:
        target += f" {os.environ.get('HF_ENDPOINT', '')} {publication.repo_id}"
    return root / f"{plan_hash}-{hashlib.sha256(target.encode()).hexdigest()[:8]}"


def known_commits(folder: Path, plan_hash: str) -> list[str | None]:
    """Return what an earlier start of this plan pinned its sources to, from the local journal.

    Returns:
        One commit a source, None for a folder; empty when there was no start.
    """
    try:
        with (folder / "journal.jsonl").open(encoding="utf-8") as journal:
            head = json.loads(journal.readline())
    except (OSError, ValueError):
        return []
    if not isinstance(head, dict) or head.get("plan_hash") != plan_hash:
        return []
    identity = head.get("identity")
    if not isinstance(identity, dict) or not all(str(key).isdigit() for key in identity):
        return []
    return [identity[key].get("commit") for key in sorted(identity, key=int)]
