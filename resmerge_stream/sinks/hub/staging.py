"""The staging branch: finished shards and the journal, until one commit on main takes them over.

A branch holds, below `FOLDER`, `head.json` (whose run it is, what it was started from) and one
file for each finished shard (its row of the journal). The branch moves with `parent_commit`, so
only one run at a time can add to it; the processes of that run share its mark.
"""

import itertools
import json
import random
import re
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from huggingface_hub import CommitOperationAdd
from huggingface_hub.hf_api import ModelInfo, RepoFile, RepoSibling

from ...errors import CheckpointNotFoundError, PlanRefusedError, Remedy, StoppedError
from ...hub.client import patiently
from ...hub.repo import HubRepo, MovedError, Operation, listed, sha256_of
from ..sink import Membership
from .deposit import is_deposited

FOLDER = "resmerge-staging"
HEAD = f"{FOLDER}/head.json"
# Files asked about in one request.
_BATCH = 100
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
        """What the first start pinned the sources to; None for a folder, nothing if malformed."""
        sources = self.identity
        if not all(key.isdigit() and isinstance(sources[key], dict) for key in sources):
            return []
        found = [sources[number].get("commit") for number in sorted(sources, key=int)]
        return found if all(isinstance(commit, str | None) for commit in found) else []


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
    files = listed(info)
    for path in files:
        if not path.startswith(f"{FOLDER}/") or path == HEAD:
            continue
        entry = repo.read_json(path, info)
        if entry is None or not _is_row(entry):
            continue
        name = entry["name"]
        if (name in files and _is_file(files[name], entry)) or is_deposited(entry):
            staged.entries[name] = entry
    return staged


def _is_row(entry: Mapping[str, Any]) -> bool:
    """Whether a JSON object is a row of the journal: anybody may have written it."""
    return (
        isinstance(entry.get("name"), str)
        and isinstance(entry.get("size"), int)
        and re.fullmatch("[0-9a-f]{64}", str(entry.get("sha256"))) is not None
        and isinstance(entry.get("tensors"), list)
        and all(isinstance(row, dict) and "name" in row for row in entry["tensors"])
    )


def _is_file(file: RepoSibling, entry: Mapping[str, Any]) -> bool:
    return (sha256_of(file), file.size) == (entry["sha256"], entry["size"])


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
        self._turn, self._plan_hash = membership.turn, plan_hash
        self._waiting: list[_StagedShard] = []
        self._committing = threading.Lock()
        if membership.is_main:
            repo.create_branch(self.branch)
        staged = read_staged(repo, plan_hash)
        if staged is None:
            raise StoppedError(f"the staging branch of {repo.id} vanished.", Remedy.CONTINUE)
        self.entries = staged.entries
        self.commit = staged.commit
        if not membership.is_main:
            return
        if staged.identity and staged.identity != json.loads(json.dumps(identity)):
            raise PlanRefusedError(
                f"the sources changed since this merge into {repo.id} was started. Restore them, "
                "or start afresh without what it left.",
                Remedy.DISCARD_STAGING,
            )
        if membership.own is not None and staged.identity and staged.owner == self._owner:
            return  # another part began it
        head = {
            "owner": self._owner,
            "plan_hash": plan_hash,
            "identity": dict(identity),
            "made_repo": made_repo or staged.made_repo,
            **({"asked": dict(asked)} if asked else {}),
        }
        data = json.dumps(head, indent=1).encode()
        self._advance("Start staging", lambda: [CommitOperationAdd(HEAD, data)], {HEAD: data})

    def look_again(self) -> None:
        """See what others that have the same mark staged by now.

        Raises:
            StoppedError: another run took the branch over, or the Hub failed.
        """
        staged = read_staged(self.repo, self._plan_hash)
        if staged is None or staged.owner != self._owner:
            raise self._taken_over()
        self.entries, self.commit = staged.entries, staged.commit

    @property
    def deposits(self) -> dict[str, dict[str, Any]]:
        """The rows of shards that wait in the target's storage, by name."""
        return {name: entry for name, entry in self.entries.items() if is_deposited(entry)}

    def differing(self, files: Mapping[str, Mapping[str, Any]]) -> set[str]:
        """Return the names of files that the branch does not hold as they should be.

        What is found, `commit` is where it was found.

        Args:
            files: size and sha256 by name.

        Raises:
            StoppedError: the network or the Hub kept failing, or another run took the branch over.
        """
        info = self.repo.info(self.branch)
        head = self.repo.read_json(HEAD, info) if info is not None else None
        if info is None or info.sha is None or head is None or head.get("owner") != self._owner:
            raise self._taken_over()
        self.commit = info.sha
        found = listed(info)
        return {
            name
            for name, file in files.items()
            if not (name in found and _is_file(found[name], file))
            and not self._waits_elsewhere(name, file, info)
        }

    def _waits_elsewhere(self, name: str, file: Mapping[str, Any], info: ModelInfo) -> bool:
        """Whether a shard that is not on the branch waits in the target's storage."""
        row = self.entries.get(name)
        if row is None:  # another process of this run sent it
            row = self.repo.read_json(f"{FOLDER}/{name}.json", info) or {}
        if not is_deposited(row) or not _is_row(row):
            return False
        self.entries[name] = row
        return all(row[key] == file[key] for key in ("size", "sha256"))

    def without_xet(self, names: set[str]) -> set[str]:
        """Return the names of staged files for which the Hub has no hash of its Xet storage.

        Raises:
            StoppedError: the network or the Hub kept failing.
        """
        found: list[RepoFile] = []
        every = sorted(names)
        for start in range(0, len(every), _BATCH):
            paths = every[start : start + _BATCH]
            answer = patiently(
                lambda paths=paths: self.repo.api.get_paths_info(  # type: ignore[misc]
                    self.repo.id, paths, revision=self.commit
                ),
                what=f"look at {self.repo.id} on the Hub",
            )
            found += [file for file in answer if isinstance(file, RepoFile)]
        return {file.path for file in found if not file.xet_hash}

    def stage(self, shard: CommitOperationAdd | None, entry: Mapping[str, Any]) -> None:
        """Commit a shard that was uploaded, with its row of the journal.

        What other threads bring while one commits waits for the next commit, and is all in that.

        Args:
            shard: what commits it; None where it waits in the target's storage.
            entry: its row.

        Raises:
            StoppedError: another run took the branch over, or the Hub failed.
        """
        data = json.dumps({**entry, "owner": self._owner}).encode()
        row = _StagedShard(shard, entry, f"{FOLDER}/{entry['name']}.json", data)
        self._waiting.append(row)
        with self._committing:
            if row not in self._waiting:
                return
            rows, proof = list(self._waiting), dict[str, str | bytes]()
            for one in rows:
                proof |= one.proof
            said = entry["name"] if len(rows) == 1 else f"{len(rows)} shards"
            try:
                self._advance(
                    f"Stage {said}", lambda: [op for one in rows for op in one.operations], proof
                )
                for one in rows:
                    self.entries[str(one.entry["name"])] = dict(one.entry)
                    self._waiting.remove(one)
            finally:
                if row in self._waiting:  # it failed: the others say so themselves
                    self._waiting.remove(row)

    def _advance(
        self,
        message: str,
        operations: Callable[[], list[Operation]],
        proof: Mapping[str, str | bytes],
    ) -> None:
        # By turns: commits of many processes that meet would be repeated more often than made.
        with self._turn() as turn:
            self.commit = turn.value or self.commit
            for number in itertools.count(1):
                try:
                    self.commit = self.repo.commit(
                        self.branch, operations, parent=self.commit, message=message, proof=proof
                    )
                    break
                except (MovedError, CheckpointNotFoundError) as exc:
                    moved_to = self._moved_by_us()
                    if moved_to is None:
                        raise self._taken_over() from exc
                    self.commit = moved_to
                    time.sleep(random.uniform(0, min(0.1 * number, _LONGEST_PAUSE_S)))
            turn.value = self.commit

    def _taken_over(self) -> StoppedError:
        """Return why the branch is not this run's any more."""
        if self.repo.info() is None:
            return StoppedError(
                f"the repository {self.repo.id} is gone from the Hub, or hidden from this token: "
                "deleted, renamed, or its rights taken. What was staged there is lost.",
                Remedy.CONTINUE,
            )
        if self.repo.head(self.branch) is None:
            return StoppedError(
                f"the staging branch {self.branch} of {self.repo.id} is gone: another run of this "
                "merge finished with it, or somebody removed it with what was staged there.",
                Remedy.CONTINUE,
            )
        return StoppedError(
            f"another run of this merge took over the staging branch {self.branch} of "
            f"{self.repo.id}, so this one stops; nothing was removed. Wait for it.",
            Remedy.CONTINUE,
        )

    def _moved_by_us(self) -> str | None:
        """Return where the branch is, if another process of this run moved it there."""
        info = self.repo.info(self.branch)
        head = self.repo.read_json(HEAD, info) if info is not None else None
        if info is None or head is None or head.get("owner") != self._owner:
            return None
        return info.sha if info.sha != self.commit else None


@dataclass(eq=False, slots=True)
class _StagedShard:
    """A shard on its way to the branch, with its row of the journal."""

    shard: CommitOperationAdd | None
    entry: Mapping[str, Any]
    path: str
    data: bytes

    @property
    def operations(self) -> list[Operation]:
        """What commits both."""
        row = CommitOperationAdd(self.path, self.data)
        return [row] if self.shard is None else [self.shard, row]

    @property
    def proof(self) -> dict[str, str | bytes]:
        """Files that only their commit leaves, as `HubRepo.commit` takes them."""
        shard = {} if self.shard is None else {str(self.entry["name"]): str(self.entry["sha256"])}
        return {self.path: self.data, **shard}
