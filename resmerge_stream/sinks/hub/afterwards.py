"""What may follow a published merge: a place in a collection, a discussion that says it is done.

Both are checked before a tensor moves, and safe to repeat, so that the next run does what a killed
one left out.
"""

from collections.abc import Mapping
from itertools import islice
from typing import Any

from huggingface_hub.hf_api import HfApi

from ...errors import Notice, ResMergeError
from ...hub.client import patiently, status_of
from ...hub.repo import HubRepo
from ...units import format_duration, format_size

_TITLE = "Merged with ResMerge Stream"
# Discussions of the account that are looked at, the newest first.
_LOOKED_AT = 50


def collection_problem(api: HfApi, account: Mapping[str, Any], slug: str) -> Notice | None:
    """Return why an account cannot add to a collection, or None.

    Args:
        api: with the account's token.
        account: the Hub's answer to whose token it is.
        slug: ``owner/title-id``.

    Raises:
        ResMergeError: the network or the Hub kept failing.
    """
    try:
        patiently(lambda: api.get_collection(slug), what=f"look at the collection {slug}")
    except ResMergeError as exc:
        if _refused_with(exc) not in (401, 403, 404):
            raise
        return Notice(
            f"there is no collection {slug} that you may see. Copy it from its address.",
            kind="no-collection",
        )
    owner = slug.partition("/")[0]
    orgs = {str(org.get("name")): org.get("roleInOrg") for org in account.get("orgs") or ()}
    if owner == account.get("name") or orgs.get(owner, "read") != "read":
        return None
    return Notice(
        f"the collection {slug} is {owner}'s, and you may not add to it. Choose one of yours.",
        kind="not-your-collection",
    )


def add_to_collection(repo: HubRepo, slug: str) -> None:
    """Add a model to a collection, unless it is in it.

    Raises:
        ResMergeError: the network or the Hub kept failing, or the right was lost.
    """
    patiently(
        lambda: repo.api.add_collection_item(slug, repo.id, "model", exists_ok=True),
        what=f"add {repo.id} to the collection {slug}",
    )


def discussion_problem(repo: HubRepo) -> Notice | None:
    """Return why nothing can be discussed in a repository that exists, or None.

    Raises:
        ResMergeError: the network or the Hub kept failing.
    """
    try:
        patiently(
            lambda: list(islice(repo.api.get_repo_discussions(repo.id), 1)),
            what=f"look at the discussions of {repo.id}",
        )
    except ResMergeError as exc:
        if _refused_with(exc) not in (403, 404, 410):
            raise
        return Notice(f"{repo.id} takes no discussions and no pull requests.", kind="discussions")
    return None


def discuss(
    repo: HubRepo, account: Mapping[str, Any], plan_hash: str, report: Mapping[str, Any]
) -> None:
    """Open a discussion that says the merge is done, unless there is one of this plan.

    Args:
        repo: what was published.
        account: the Hub's answer to whose token it is.
        plan_hash: of the merge; it is part of the title.
        report: of the merge.

    Raises:
        ResMergeError: the network or the Hub kept failing.
    """
    title = f"{_TITLE} ({plan_hash})"
    author = str(account.get("name"))

    def ask() -> None:
        known = islice(repo.api.get_repo_discussions(repo.id, author=author), _LOOKED_AT)
        if any(discussion.title == title for discussion in known):
            return
        repo.api.create_discussion(repo.id, title=title, description=_said(report))

    patiently(ask, what=f"open a discussion in {repo.id}")


def _said(report: Mapping[str, Any]) -> str:
    """Return the post: what a reader of the card may know, and nothing more."""
    summary, method = report["summary"], report.get("method")
    name = method.get("name") if isinstance(method, dict) else None
    written, seconds = summary.get("bytes_written"), summary.get("seconds")
    facts = [
        f"The merge is done: {len(report['tensors'])} tensors",
        *([f"by {name}"] if isinstance(name, str) else []),
        *([f"{format_size(written)} written"] if isinstance(written, int) else []),
        *([f"in {format_duration(seconds)}"] if isinstance(seconds, int | float) else []),
    ]
    lines = [
        ", ".join(facts) + ".",
        *(f"- {text}" for text in list(summary.get("warnings") or ())[:10]),
        "",
        "The card says what was merged and how to make it again; `resmerge/report.json` has what "
        "was decided for every tensor.",
    ]
    return "\n".join(lines)


def _refused_with(exc: ResMergeError) -> int | None:
    return status_of(exc.__cause__) if exc.__cause__ is not None else None
