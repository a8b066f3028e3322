"""The staging branch: finished shards and the journal, until one commit on main takes them over.

A branch holds, below `FOLDER`, `head.json` (whose run it is, what it was started from) and one
file for each finished shard (its row of the journal). The branch moves with `parent_commit`, so
only one run at a time can add to it; the processes of that run share its mark.
"""

import itertools
import json
import random
import re
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from huggingface_hub import CommitOperationAdd
from huggingface_hub.hf_api import ModelInfo

from ...errors import CheckpointNotFoundError, PlanRefusedError, Remedy, StoppedError
from ...hub.repo import HubRepo, MovedError, Operation, listed, sha256_of
from ..sink import Membership

FOLDER = "resmerge-staging"
HEAD = f"{FOLDER}/head.json"
# Processes that commit at the same moment try again at different ones.
_LONGEST_PAUSE_S = 2.0
_BRANCH = re.compile(r"resmerge-[0-9a-f]{16}")


def branch_name(plan_hash: str) -> str:
    """Return the staging branch of a plan."""
    return f"resmerge-{plan_hash}"


def is_branch_name(name: str) -> bool:
    """Whether a branch is called like a staging branch."""
    return _BRANCH.fullmatch(name) is not None


@dataclass(slots=True)
class Staged:
    """What a staging branch holds.

    Attributes:
        repo: the repository of the branch: the target, or its sibling.
        branch: its name.
        commit: where it is.
        owner: the run that committed last.
        identity: of the sources, as the first start saw them.
        made_repo: whether the repository was created by a run, for the staging alone.
        asked: what was asked for, where the run wrote it down.
        entries: of shards whose file on the branch is the one that the journal names.
    """

    repo: HubRepo
    branch: str
    commit: str
    owner: str = ""
    identity: dict[str, Any] = field(default_factory=dict)
    made_repo: bool = False
    asked: dict[str, Any] = field(default_factory=dict)
    entries: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def commits(self) -> list[str | None]:
        """What the first start pinned the sources to; None for a folder."""
        numbers = sorted(self.identity, key=int)
        return [self.identity[number].get("commit") for number in numbers]


def read_staged(repo: HubRepo, plan_hash: str) -> Staged | None:
    """Return what the staging branch of a plan holds, or None where there is none."""
    branch = branch_name(plan_hash)
    info = repo.info(branch)
    if info is None or info.sha is None:
        return None
    staged = Staged(repo, branch, info.sha)
    head = repo.read_json(HEAD, info)
    if head is None or head.get("plan_hash") != plan_hash:
        return staged
    identity = head.get("identity")
    staged.owner = str(head.get("owner", ""))
    staged.identity = identity if isinstance(identity, dict) else {}
    staged.made_repo = head.get("made_repo") is True
    asked = head.get("asked")
    staged.asked = asked if isinstance(asked, dict) else {}
    staged.entries = _entries(repo, info)
    return staged


def _entries(repo: HubRepo, info: ModelInfo) -> dict[str, dict[str, Any]]:
    files, found = listed(info), {}
    for path in files:
        if not path.startswith(f"{FOLDER}/") or path == HEAD:
            continue
        entry = repo.read_json(path, info)
        name = str(entry.get("name")) if entry is not None else ""
        if entry is None or name not in files:
            continue
        if sha256_of(files[name]) == entry.get("sha256") and files[name].size == entry.get("size"):
            found[name] = entry
    return found


class Staging:
    """One run's hold of a staging branch.

    Args:
        repo: where the branch is or will be.
        plan_hash: names it.
        identity: of the sources of this run.
        membership: as what this process of the run comes; its mark is the branch's owner.
        made_repo: whether this run created the repository for the staging alone.
        asked: what was asked for, so that the run can be continued from here alone.

    Raises:
        PlanRefusedError: the sources are not those of the first start.
        StoppedError: another run took the branch over at this moment, or the Hub failed.
    """

    def __init__(
        self,
        repo: HubRepo,
        plan_hash: str,
        identity: Mapping[str, Any],
        membership: Membership,
        *,
        made_repo: bool,
        asked: Mapping[str, Any] | None = None,
    ) -> None:
        self.repo, self.branch = repo, branch_name(plan_hash)
        self._owner = membership.mark or uuid.uuid4().hex
        self._turn = membership.turn
        if membership.is_main:
            repo.create_branch(self.branch)
        staged = read_staged(repo, plan_hash)
        if staged is None:
            raise StoppedError(f"the staging branch of {repo.id} vanished.", Remedy.CONTINUE)
        self.entries = staged.entries
        self._commit = staged.commit
        if not membership.is_main:
            return
        if staged.identity and staged.identity != json.loads(json.dumps(identity)):
            raise PlanRefusedError(
                f"the sources changed since this merge into {repo.id} was started. Restore them, "
                "or start afresh without what it left.",
                Remedy.DISCARD_STAGING,
            )
        head = {
            "owner": self._owner,
            "plan_hash": plan_hash,
            "identity": dict(identity),
            "made_repo": made_repo or staged.made_repo,
            **({"asked": dict(asked)} if asked else {}),
        }
        data = json.dumps(head, indent=1).encode()
        self._advance("Start staging", lambda: [_add(HEAD, data)], {HEAD: data})

    def stage(self, shard: CommitOperationAdd, entry: Mapping[str, Any]) -> None:
        """Commit a shard that was uploaded, with its row of the journal.

        Raises:
            StoppedError: another run took the branch over, or the Hub failed.
        """
        name = str(entry["name"])
        path = f"{FOLDER}/{name}.json"
        data = json.dumps({**entry, "owner": self._owner}).encode()
        self._advance(
            f"Stage {name}",
            lambda: [shard, _add(path, data)],
            {path: data, name: str(entry["sha256"])},
        )
        self.entries[name] = dict(entry)

    def _advance(
        self,
        message: str,
        operations: Callable[[], list[Operation]],
        proof: Mapping[str, str | bytes],
    ) -> None:
        # By turns: commits of many processes that meet would be repeated more often than made.
        with self._turn() as turn:
            self._commit = turn.value or self._commit
            self._commit_on_top(message, operations, proof)
            turn.value = self._commit

    def _commit_on_top(
        self,
        message: str,
        operations: Callable[[], list[Operation]],
        proof: Mapping[str, str | bytes],
    ) -> None:
        for number in itertools.count(1):
            try:
                self._commit = self.repo.commit(
                    self.branch, operations, parent=self._commit, message=message, proof=proof
                )
                return
            except (MovedError, CheckpointNotFoundError) as exc:
                moved_to = self._moved_by_us()
                if moved_to is None:
                    raise StoppedError(
                        f"another run of this merge took over the staging branch {self.branch} of "
                        f"{self.repo.id}, so this one stops; nothing was removed. Wait for it.",
                        Remedy.CONTINUE,
                    ) from exc
                self._commit = moved_to
                time.sleep(random.uniform(0, min(0.1 * number, _LONGEST_PAUSE_S)))

    def _moved_by_us(self) -> str | None:
        """Return where the branch is, if another process of this run moved it there."""
        info = self.repo.info(self.branch)
        head = self.repo.read_json(HEAD, info) if info is not None else None
        if info is None or head is None or head.get("owner") != self._owner:
            return None
        return info.sha if info.sha != self._commit else None


def _add(path: str, data: bytes) -> CommitOperationAdd:
    return CommitOperationAdd(path, data)
