"""Finds the unfinished merges of an account by their staging branches."""

from dataclasses import dataclass
from itertools import islice
from typing import Any

from ...hub.account import whoami
from ...hub.client import client, patiently
from ...hub.repo import HubRepo
from .staging import is_branch_name, read_staged


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
