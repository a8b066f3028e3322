"""What runs left on the Hub: an account's unfinished merges, and removing what they staged."""

from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from typing import Any

from ...errors import ResMergeError
from ...hub.account import whoami
from ...hub.client import FAILURES, client, patiently, status_of
from ...hub.repo import HubRepo, listed
from .staging import HEAD, branch_name, is_branch_name, read_staged
from .target import pull_request_sibling, sibling_id


@dataclass(frozen=True, slots=True)
class Unfinished:
    """A merge that stopped before it was published.

    Attributes:
        repo_id: where its shards are staged.
        plan_hash: of the run.
        shards: how many are finished.
        nbytes: their bytes.
        asked: what was asked for: as `Request.to_dict`, from the run's own hand.
    """

    repo_id: str
    plan_hash: str
    shards: int
    nbytes: int
    asked: dict[str, Any]


def unfinished_merges(token: str, *, limit: int = 20) -> list[Unfinished]:
    """Return what an account's own repositories hold of unfinished merges.

    Args:
        token: the account's.
        limit: how many repositories are looked at, the last modified first.

    Raises:
        ResMergeError: the Hub refuses or fails.
    """
    api = client(token)
    author = str(whoami(api)["name"])
    models = patiently(
        lambda: list(islice(api.list_models(author=author, sort="last_modified"), limit)),
        what=f"list the repositories of {author}",
    )
    found = []
    for model in models:
        repo = HubRepo(api, model.id)
        for branch in filter(is_branch_name, repo.branches()):
            plan_hash = branch.rpartition("-")[2]
            staged = read_staged(repo, plan_hash)
            if staged is not None and staged.asked:
                nbytes = sum(int(entry["size"]) for entry in staged.entries.values())
                found.append(
                    Unfinished(repo.id, plan_hash, len(staged.entries), nbytes, staged.asked)
                )
    return found


def discard_staging(repo_id: str, token: str | None, *, create_pr: bool = False) -> list[str]:
    """Remove the staging of every unfinished merge into a repository; return what was removed.

    A staging branch is told by its name and by the mark in it; a sibling repository is removed
    only where its mark says that a run made it, and its main branch is empty.

    Args:
        repo_id: the target.
        token: of the account; None for the login.
        create_pr: whether they were to be pull requests, which leave nothing in the target.

    Raises:
        ResMergeError: the Hub refuses or fails.
    """
    api = client(token)
    repo = HubRepo(api, repo_id)
    removed = []
    named = sibling_id(repo_id, "")
    if create_pr:
        named = pull_request_sibling(str(whoami(api)["name"]), repo_id, "")
    elif repo.info() is not None:
        for name in filter(is_branch_name, repo.branches()):
            if (info := repo.info(name)) is None:
                continue
            # One at main was made a moment before its run was killed; nothing is on it.
            is_empty = info.sha == repo.head("main")
            head = None if is_empty else repo.read_json(HEAD, info)
            is_marked = head is not None and branch_name(str(head.get("plan_hash"))) == name
            if is_empty or is_marked:
                repo.delete_branch(name)
                removed.append(f"branch {name} of {repo_id}")
    namespace, search = named.split("/")
    siblings = []
    with suppress(ResMergeError):
        siblings = patiently(
            lambda: list(api.list_models(author=namespace, search=search)),
            what=f"look for staging repositories {named}…",
        )
    for model in siblings:
        plan_hash = model.id.rpartition("-resmerge-")[2]
        if model.id.startswith(named) and discard_sibling(HubRepo(api, model.id), plan_hash):
            removed.append(f"repository {model.id}")
    return removed


def discard_sibling(repo: HubRepo, plan_hash: str) -> bool:
    """Remove the private repository that a run made for its staging alone, if it did."""
    info = repo.info(branch_name(plan_hash))
    main = repo.info() if info is not None else None
    if info is None or main is None or listed(main):
        return False
    head = repo.read_json(HEAD, info)
    if head is None or head.get("made_repo") is not True or head.get("plan_hash") != plan_hash:
        return False

    def ask() -> None:
        try:
            repo.api.delete_repo(repo.id)
        except FAILURES as exc:
            if status_of(exc) != 404:
                raise

    patiently(ask, what=f"remove the staging repository {repo.id}")
    return True
