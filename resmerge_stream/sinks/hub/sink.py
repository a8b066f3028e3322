"""A repository as target: shards staged one by one, then one commit that shows them all.

That commit is main's next one, or a pull request, for which nothing else there is touched.
"""

import json
import threading
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from typing import Any, Self

from huggingface_hub import CommitOperationAdd, CommitOperationCopy, CommitOperationDelete
from huggingface_hub.utils._runtime import is_xet_available

from ...device import machine_share
from ...errors import OutputExistsError, PlanRefusedError, Remedy
from ...hub.repo import HubRepo, MovedError, Operation, listed
from ...pipes import WriteBehind
from ..folder import REPORT, FolderSink
from ..layout import Shard
from ..sink import Membership, ShardWriter, Sink
from .afterwards import add_to_collection, discuss
from .deposit import deposited_file, is_deposited, missing_from
from .leftovers import discard_sibling
from .staging import Staging, branch_name
from .target import (
    HubTarget,
    finished_at,
    has_xet,
    no_xet,
    pull_request_of,
    replaced_files,
    sibling_id,
    staging_repo,
)
from .upload import DepositSender, FileSender, StreamSender

# Shards under way at a time: around its bytes, each waits for six answers of the Hub, so that one
# alone would leave the line idle. How many bytes that is, the room on the disk says.
_SENDERS = 4


class HubSink(Sink):
    """Publishes a merge. See `Sink`.

    Args:
        target: as the plan found it, without problems and not finished.
        plan_hash: what marks this run's staging.
        shards: all planned shards.
        shelf: where shards lie as files until they are staged, with the local journal; opened and
            closed with this sink.
        keep_files: whether they stay there afterwards, since a folder was asked for too.
        identity: of the sources; a later run must see the same.
        membership: as what this process of the run comes.
        asked: what was asked for, kept beside the staged shards.
    """

    def __init__(
        self,
        target: HubTarget,
        plan_hash: str,
        shards: tuple[Shard, ...],
        shelf: FolderSink,
        *,
        keep_files: bool,
        identity: Mapping[str, Any],
        membership: Membership | None = None,
        asked: Mapping[str, Any] | None = None,
    ) -> None:
        self._member = membership or Membership()
        self._target, self._shards = target, {shard.name: shard for shard in shards}
        self._shelf, self._keep_files = shelf, keep_files
        self._plan_hash, self._identity, self._asked = plan_hash, identity, asked
        self._creates_pr = target.publication.create_pr
        largest = max((shard.nbytes for shard in shards), default=0)
        allowed = target.publication.max_disk
        self._disk = 2 * largest if allowed is None else allowed // machine_share()[1]
        self._streams = allowed == 0
        self._sent, self._sending = 0, dict[str, int]()
        self._counting = threading.Lock()

    def open(self) -> Self:
        """Make the repository and the staging branch this run's, and see what is staged there.

        Raises:
            OutputExistsError: somebody made the repository since the plan.
            PlanRefusedError: the sources changed, or the Hub has no Xet storage for
                `--max-disk 0`.
            StoppedError: the network or the Hub failed.
        """
        member, target, plan_hash = self._member, self._target, self._plan_hash
        with ExitStack() as undo:
            self._shelf.open()
            undo.callback(self._shelf.close)
            info = target.info
            if member.is_main and info is None:
                target.repo.create()
                info = target.repo.info()
                if info is None or not info.private or len(info.siblings or ()) > 1:
                    raise OutputExistsError(
                        f"somebody else made {target.repo.id} a moment ago; nothing there is "
                        "touched.",
                        Remedy.ANOTHER_REPO,
                    )
            self._main = str(info.sha) if member.is_main and info is not None else ""
            repo = staging_repo(target, plan_hash)
            made = (
                member.is_main
                and repo is not target.repo
                and (repo.create() or _is_unmarked(repo, plan_hash))
            )
            if self._streams and not has_xet(repo):
                raise PlanRefusedError(no_xet(repo))
            self._sender: FileSender
            if repo is not target.repo and not (is_xet_available() and has_xet(repo)):
                self._sender = self._deposit_sender()
            else:
                kind = StreamSender if self._streams else FileSender
                self._sender = kind(self._shelf, repo, branch_name(plan_hash))
            self._staging = Staging(
                repo, plan_hash, self._identity, member, made_repo=made, asked=self._asked
            )
            self._uploads = WriteBehind(None, _SENDERS)
            self._queued: set[str] = set()
            # What earlier runs finished here and had not sent is sent.
            on_shelf = dict(self._shelf.finished_shards())
            staged = self._staged()
            self._staged_before = set(staged)
            self._finished = on_shelf if self._keep_files else {**staged, **on_shelf}
            for name, entry in on_shelf.items() if member.is_first else ():
                self._queue(self._shards[name], entry)
            undo.pop_all()
        return self

    @property
    def bytes_sent(self) -> int:
        """Bytes that this run has sent: shards, and what is read of those that go as files.

        hf_xet does not tell how far it is: with Xet storage, whole shards are counted.
        """
        with self._counting:
            return self._sent + sum(self._sending.values())

    @property
    def bytes_to_send(self) -> int:
        """Bytes of this run's shards that were not staged when it began."""
        own = self._shards if self._member.own is None else self._member.own
        left = self._shards.keys() - self._staged_before
        return sum(self._shards[name].nbytes for name in left if name in own)

    def finished_shards(self) -> Mapping[str, dict[str, Any]]:
        """Return the entries of shards that need not be merged again."""
        return self._finished

    def by_now(self) -> Mapping[str, dict[str, Any]]:
        """Return the entries of all shards that are staged by now, by whichever part.

        Raises:
            StoppedError: the Hub kept failing, or another run took the branch over.
        """
        self._staging.look_again()
        self._finished = self._staged()
        return self._finished

    def make_room(self, shard: Shard) -> None:
        """Wait until the disk has room beside the shards that are being sent."""
        if shard.name in self._queued:
            self._uploads.drain()  # it is made again: what was made of it first is still read
        if not self._keep_files and not self._streams:
            self._uploads.drain(down_to=self._disk - shard.nbytes)

    def settle(self) -> None:
        """Wait until every shard is staged on the Hub."""
        self._uploads.drain()

    def open_shard(self, shard: Shard) -> ShardWriter:
        """Start a shard: a file, or a stream."""
        return self._sender.open_shard(shard)

    def keep(self, shard: Shard, entry: Mapping[str, Any]) -> None:
        """Record a finished shard here, and have it sent and recorded on the Hub."""
        self._sender.keep(shard, entry)
        self._queue(shard, entry)

    def lost(self, files: Iterable[Mapping[str, Any]]) -> list[str]:
        """Return the shards whose staged file is not what the journal says, or cannot be shown.

        They are forgotten here, so that they are merged and sent again.
        """
        wanted = {str(file["name"]): file for file in files}
        names = self._staging.differing(wanted)
        if isinstance(self._sender, DepositSender):
            gone = missing_from(self._target.repo, wanted.values(), create_pr=self._creates_pr)
            names |= gone & set(self._staging.deposits)
        elif self._staging.repo is not self._target.repo and (
            unshown := self._staging.without_xet(set(wanted) - names)
        ):
            # Nothing can be taken over from the private repository: it goes where it will stand.
            self._sender = self._deposit_sender()
            names |= unshown
        for name in names:
            self._staging.entries.pop(name, None)
        return sorted(names)

    def publish(self, files: Mapping[str, bytes]) -> str:
        """Make the one commit that shows everything, then do what was asked for beside it."""
        report = json.loads(files[REPORT])
        where = self._open_pull_request(files) if self._creates_pr else self._commit(files)
        finish_target(self._target, self._plan_hash, report)
        if self._keep_files:
            self._shelf.publish(files)
        else:
            self._shelf.abandon()
        return where

    def _open_pull_request(self, files: Mapping[str, bytes]) -> str:
        target = self._target
        _, stale = replaced_files(target, [*self._shards, *files])
        identity = json.loads(files[REPORT]).get("identity")
        target.pull_request = target.repo.open_pull_request(
            lambda: self._final_operations(files, stale),
            parent=self._main,
            message="Merge with ResMerge Stream",
            description=(
                "A merged model in place of what stands here. Its card says what was merged and "
                "how to make it again; `resmerge/report.json` has what was decided for each tensor."
            ),
            known=lambda: pull_request_of(target, self._plan_hash, identity)[0],
        )
        return target.page

    def _commit(self, files: Mapping[str, bytes]) -> str:
        repo = self._target.repo
        _, stale = replaced_files(self._target, [*self._shards, *files])
        try:
            commit = repo.commit(
                "main",
                lambda: self._final_operations(files, stale),
                parent=self._main,
                message="Merge with ResMerge Stream",
                proof={REPORT: files[REPORT]},
            )
        except MovedError as exc:
            landed = finished_at(repo, self._plan_hash, json.loads(files[REPORT]))
            if landed is None:
                raise OutputExistsError(
                    f"main of {repo.id} was changed while this merge ran, so it is not touched; "
                    "nothing was removed. The shards stay on the branch "
                    f"{self._staging.branch}. Look at what changed first.",
                    Remedy.REPLACE,
                    Remedy.ANOTHER_REPO,
                ) from exc
            # The last commit of a run that was killed was still on its way.
            commit = landed
        return f"{repo.page}/commit/{commit}"

    def abandon(self) -> None:
        """Remove what this run staged, since it can never be finished."""
        # An interrupted command must not wait for gigabytes to be sent.
        self._uploads.close(wait=False)
        self._staging.repo.delete_branch(self._staging.branch)
        self._shelf.abandon()

    def close(self) -> None:
        """Stop sending, and release the lock."""
        # An interrupted command must not wait for gigabytes to be sent.
        self._uploads.close(wait=False)
        self._shelf.close()

    def _staged(self) -> dict[str, dict[str, Any]]:
        """Return the entries of what is staged whole, by name; what is gone is forgotten."""
        entries = [e for n, e in self._staging.entries.items() if n in self._shards]
        waiting = [entry for entry in entries if is_deposited(entry)]
        gone = missing_from(self._target.repo, waiting, create_pr=self._creates_pr)
        for name in gone:
            del self._staging.entries[name]
        return {
            str(entry["name"]): entry
            for entry in entries
            if entry["size"] == self._shards[str(entry["name"])].nbytes
            and entry["name"] not in gone
        }

    def _queue(self, shard: Shard, entry: Mapping[str, Any]) -> None:
        self._queued.add(shard.name)
        self._uploads.put(shard.nbytes, lambda: self._send(shard, entry))

    def _send(self, shard: Shard, entry: Mapping[str, Any]) -> None:
        def now_at(position: int) -> None:
            with self._counting:
                self._sending[shard.name] = position

        known = self._staging.entries.get(shard.name)
        if known is None or known["sha256"] != entry["sha256"]:
            self._staging.stage(*self._sender.send(entry, now_at))
            with self._counting:
                self._sending.pop(shard.name, None)
                self._sent += shard.nbytes
        if not self._keep_files:
            self._shelf.free(shard.name)

    def _deposit_sender(self) -> DepositSender:
        return DepositSender(self._shelf, self._target.repo, "main", create_pr=self._creates_pr)

    def _final_operations(self, files: Mapping[str, bytes], stale: list[str]) -> list[Operation]:
        staging = self._staging
        source = staging.repo.id if staging.repo is not self._target.repo else None
        shards: list[Operation] = [
            deposited_file(staging.deposits[name])
            if name in staging.deposits
            else CommitOperationCopy(
                name,
                name,
                # The commit whose files were compared, not what the branch holds by now.
                src_revision=staging.commit,
                src_repo_id=source,
                src_repo_type="model" if source is not None else None,
            )
            for name in self._shards
        ]
        additions = [CommitOperationAdd(name, data) for name, data in files.items()]
        return [*shards, *additions, *(CommitOperationDelete(name) for name in stale)]


def _is_unmarked(sibling: HubRepo, plan_hash: str) -> bool:
    """Whether a run of this plan was killed after it made the sibling, before it could mark it.

    Its name holds the plan's hash, so an empty private repository of that name is ours.
    """
    info = sibling.info()
    if info is None or not info.private or listed(info):
        return False
    return sibling.head(branch_name(plan_hash)) in (None, info.sha)


def finish_target(target: HubTarget, plan_hash: str, report: Mapping[str, Any]) -> None:
    """Do what follows the commit: the staging goes, the visibility is set, then the rest.

    Safe to repeat, so that a run killed in the middle of it can be finished by the next.

    Raises:
        StoppedError: the network or the Hub kept failing.
    """
    publication = target.publication
    if publication.create_pr:
        discard_sibling(staging_repo(target, plan_hash), plan_hash)
        return
    target.repo.delete_branch(branch_name(plan_hash))
    discard_sibling(HubRepo(target.repo.api, sibling_id(target.repo.id, plan_hash)), plan_hash)
    public = publication.public
    if public is not None and public is target.is_private:
        target.repo.set_public(public)
    if publication.collection:
        add_to_collection(target.repo, publication.collection)
    if publication.discuss:
        discuss(target.repo, target.account, plan_hash, report)
