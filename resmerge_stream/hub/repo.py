"""A repository of the Hub that this tool writes to: reading its state, committing with care.

A commit whose answer was lost may have happened: whether it did is told by its content.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from typing import Any, TypeVar

from huggingface_hub import (
    CommitInfo,
    CommitOperationAdd,
    CommitOperationCopy,
    CommitOperationDelete,
)
from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.hf_api import GitRefs, HfApi, ModelInfo, RepoFile, RepoSibling

from ..documents import load_json
from ..errors import StoppedError
from .client import (
    FAILURES,
    explain,
    is_link_refused,
    is_transient,
    patiently,
    reason,
    status_of,
    wait_seconds,
)
from .patience import Tries
from .ranges import RemoteFile

T = TypeVar("T")
Operation = CommitOperationAdd | CommitOperationCopy | CommitOperationDelete
# A small large file, such as a picture, is uploaded within its commit.
_REFUSED_TRIES = 3
_GIT_FILES = {".gitattributes", ".gitignore"}


class MovedError(StoppedError):
    """The branch is not where it was: somebody else committed to it."""


class HubRepo:
    """One model repository.

    Args:
        api: the library's client, with the caller's token.
        repo_id: ``namespace/name``.
    """

    def __init__(self, api: HfApi, repo_id: str) -> None:
        self.api, self.id = api, repo_id

    @property
    def page(self) -> str:
        """Its address for people."""
        return f"{self.api.endpoint}/{self.id}"

    def info(self, revision: str = "main") -> ModelInfo | None:
        """Return what stands at a revision, or None where there is no such thing to be seen."""

        def ask() -> ModelInfo | None:
            try:
                return self.api.model_info(
                    self.id, revision=revision, files_metadata=True, timeout=60
                )
            except (RepositoryNotFoundError, RevisionNotFoundError):
                return None

        return patiently(ask, what=f"look at {self.id} on the Hub")

    def create(self) -> bool:
        """Create it, private; return False where it exists already."""

        def ask() -> bool:
            try:
                self.api.create_repo(self.id, private=True)
            except FAILURES as exc:
                if status_of(exc) == 409:
                    return False
                raise
            return True

        return patiently(ask, what=f"create {self.id} on the Hub")

    def create_branch(self, branch: str) -> None:
        """Create a branch at main, unless it is there."""
        patiently(
            lambda: self.api.create_branch(self.id, branch=branch, exist_ok=True),
            what=f"create a staging branch in {self.id}",
        )

    def delete_branch(self, branch: str) -> None:
        """Remove a branch, if it is there."""

        def ask() -> None:
            try:
                self.api.delete_branch(self.id, branch=branch)
            except FAILURES as exc:
                if status_of(exc) != 404:
                    raise
            if self.info(branch) is not None:
                raise ConnectionError("it is still there: another answered in the Hub's place")

        patiently(ask, what=f"remove the staging branch of {self.id}")

    def branches(self) -> list[str]:
        """Return the names of all branches."""
        return [branch.name for branch in self._refs().branches]

    def revisions(self) -> list[str]:
        """Return the names of all branches and tags."""
        refs = self._refs()
        return [ref.name for ref in (*refs.branches, *refs.tags)]

    def _refs(self) -> GitRefs:
        return patiently(
            lambda: self.api.list_repo_refs(self.id), what=f"list the branches of {self.id}"
        )

    def set_public(self, public: bool) -> None:
        """Make it public, or private."""
        patiently(
            lambda: self.api.update_repo_settings(self.id, private=not public),
            what=f"change the visibility of {self.id}",
        )

    def read(self, name: str, info: ModelInfo) -> bytes:
        """Return a file's content at the commit of an info, without leaving it on this disk."""
        size = listed(info)[name].size or 0
        from huggingface_hub import hf_hub_url

        url = hf_hub_url(self.id, name, revision=info.sha, endpoint=self.api.endpoint)
        if size == 0:
            return b""
        file = RemoteFile(f"{self.id}/{name}", url, self.api._build_hf_headers(), size)
        return bytes(file.read(0, size))

    def read_json(self, name: str, info: ModelInfo) -> dict[str, Any] | None:
        """Return a JSON object, or None where the file is missing or something else."""
        if name not in listed(info):
            return None
        try:
            value = load_json(self.read(name, info))
        except ValueError:
            return None
        return value if isinstance(value, dict) else None

    def commit(
        self,
        branch: str,
        operations: Callable[[], Sequence[Operation]],
        *,
        parent: str,
        message: str,
        proof: Mapping[str, str | bytes],
    ) -> str:
        """Commit to a branch that must still be at `parent`; return the new commit's hash.

        Args:
            branch: where to.
            operations: makes them afresh for every try.
            parent: the commit that the branch must be at.
            message: the commit's title.
            proof: files by path that only this commit leaves: sha256 in hex, or content.

        Raises:
            MovedError: somebody else committed first.
            StoppedError: the Hub kept failing, or refused.
        """

        def landed() -> str | None:
            head = self.head(branch)
            if head == parent:
                return None
            if head is not None and self.holds(head, proof):
                return head
            raise MovedError(f"{self.id} ({branch}) was changed by somebody else in the meantime.")

        done = self._committed(
            operations,
            f"commit to {self.id}",
            landed,
            moved=412,
            commit_message=message,
            revision=branch,
            parent_commit=parent,
        )
        return str(done.oid) if isinstance(done, CommitInfo) else done

    def open_pull_request(
        self,
        operations: Callable[[], Sequence[Operation]],
        *,
        parent: str,
        message: str,
        description: str,
        known: Callable[[], int | None],
    ) -> int:
        """Open a pull request with one commit on top of `parent`; return its number.

        Args:
            operations: makes them afresh for every try.
            parent: the commit of main that it starts from; main may have moved on.
            message: the pull request's title.
            description: what it says.
            known: returns the number of one that a lost answer may have left.

        Raises:
            StoppedError: the Hub kept failing, or refused.
        """
        what = f"open a pull request on {self.id}"
        done = self._committed(
            operations,
            what,
            known,
            commit_message=message,
            commit_description=description,
            revision="main",
            parent_commit=parent,
            create_pr=True,
        )
        number = done.pr_num if isinstance(done, CommitInfo) else done
        if number is None:
            raise StoppedError(f"cannot {what}: nothing there would change.")
        return int(number)

    def _committed(
        self,
        operations: Callable[[], Sequence[Operation]],
        what: str,
        landed: Callable[[], T | None],
        *,
        moved: int | None = None,
        **how: Any,
    ) -> CommitInfo | T:
        """Return the Hub's answer to a commit, or what a lost answer has left.

        Args:
            operations: makes them afresh for every try.
            what: is done, for the message.
            landed: is asked after each failure; None: nothing is there.
            moved: the status that is no refusal, as `landed` finds the branch somewhere else.
            how: as for `HfApi.create_commit`.
        """
        tries = Tries()
        while True:
            try:
                info: CommitInfo = self.api.create_commit(self.id, list(operations()), **how)
                return info
            except FAILURES as exc:
                refused = not is_transient(exc) and (moved is None or status_of(exc) != moved)
                if refused and not (is_link_refused(exc) and tries.failures < _REFUSED_TRIES):
                    raise explain(exc, what) from exc
                if (left := landed()) is not None:
                    return left
                if not tries.failed(wait=(wait := wait_seconds(tries.failures + 1, exc))):
                    raise explain(exc, what) from exc
                tries.wait(wait, f"cannot {what}: {reason(exc)}")

    def pull_requests(self, author: str, *, limit: int) -> list[int]:
        """Return the numbers of somebody's open pull requests, at most so many."""
        found = patiently(
            lambda: list(
                islice(
                    self.api.get_repo_discussions(
                        self.id,
                        author=author,
                        discussion_type="pull_request",
                        discussion_status="open",
                    ),
                    limit,
                )
            ),
            what=f"look at the pull requests of {self.id}",
        )
        return [discussion.num for discussion in found]

    def head(self, branch: str) -> str | None:
        """Return the commit that a branch is at, or None where there is no branch."""
        info = self.info(branch)
        return info.sha if info is not None else None

    def holds(self, revision: str, files: Mapping[str, str | bytes]) -> bool:
        """Whether a revision has files of these contents: sha256 in hex, or the bytes."""
        found = patiently(
            lambda: self.api.get_paths_info(self.id, list(files), revision=revision),
            what=f"look at {self.id} on the Hub",
        )
        known = {file.path: file for file in found if isinstance(file, RepoFile)}
        return all(
            path in known and _is_content(known[path], content) for path, content in files.items()
        )


def listed(info: ModelInfo) -> dict[str, RepoSibling]:
    """Return a revision's files by path, without git's own."""
    siblings = info.siblings or ()
    return {s.rfilename: s for s in siblings if s.rfilename not in _GIT_FILES}


def sha256_of(sibling: RepoSibling) -> str | None:
    """Return the sha256 of a large file, which the Hub knows."""
    return sibling.lfs.sha256 if sibling.lfs is not None else None


def _is_content(file: RepoFile, content: str | bytes) -> bool:
    if isinstance(content, str):
        return file.lfs is not None and file.lfs.sha256 == content
    if file.lfs is not None:
        return file.lfs.sha256 == hashlib.sha256(content).hexdigest()
    blob = hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False)
    return file.blob_id == blob.hexdigest()
