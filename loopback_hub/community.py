"""Discussions, pull requests as people see them, collections."""

from typing import Any

from starlette.responses import JSONResponse, Response

from .repo import Repo, now
from .web import REPO, Call, HubError, Route, route


def next_number(repo: Repo) -> int:
    """The number of the next discussion or pull request: they share one count."""
    opened = [int(ref.rpartition("/")[2]) for ref in repo.refs() if ref.startswith("refs/pr/")]
    return max([*opened, *(post["num"] for post in _posts(repo))], default=0) + 1


def open_to(call: Call) -> Repo:
    """The repository in the path, where the caller may open discussions and pull requests."""
    identity, repo = call.caller(), call.repo()
    if identity.scopes is None:
        allowed = identity.role == "write"
    else:
        allowed = identity.has_scope("write-discussions") or call.may_write(repo)
    if not allowed:
        raise HubError(403, f"You don't have the rights to open a discussion in {repo.id}.")
    if repo.settings.get("discussions_disabled"):
        raise HubError(403, f"Discussions are disabled for {repo.id}.")
    return repo


def _posts(repo: Repo) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = repo.settings.get("posts", [])
    return found


def _pull_requests(repo: Repo) -> list[dict[str, Any]]:
    found = []
    for ref in repo.refs():
        if ref.startswith("refs/pr/"):
            commit, number = repo.at(ref), int(ref.rpartition("/")[2])
            closed = number in repo.settings.get("closed", [])
            found.append(
                {
                    "num": number,
                    "title": commit.title,
                    "author": {"name": commit.author},
                    "createdAt": commit.date,
                    "status": "closed" if closed else "open",
                    "isPullRequest": True,
                }
            )
    return found


async def discussions(call: Call) -> Response:
    """List discussions and pull requests, the newest first, as far as they were asked for."""
    repo, query = call.repo(), call.request.query_params
    if repo.settings.get("discussions_disabled"):
        raise HubError(403, f"Discussions are disabled for {repo.id}.")
    kind = {"pull_request": True, "discussion": False}.get(query.get("type", ""))
    found = [
        {**post, "repo": {"name": repo.id, "type": "model"}}
        for post in sorted([*_posts(repo), *_pull_requests(repo)], key=lambda post: -post["num"])
        if query.get("author") in (None, post["author"]["name"])
        and query.get("status", "all") in ("all", post["status"])
        and kind in (None, post["isPullRequest"])
    ]
    return JSONResponse({"discussions": found, "count": len(found), "start": 0})


async def create_discussion(call: Call) -> Response:
    """Open a discussion."""
    repo, asked = open_to(call), await call.json()
    post = {
        "num": next_number(repo),
        "title": asked["title"],
        "author": {"name": call.caller().user},
        "createdAt": now(),
        "status": "open",
        "isPullRequest": False,
        "said": asked["description"],
    }
    repo.update_settings(posts=[*_posts(repo), post])
    return JSONResponse({"num": post["num"]})


async def discussion(call: Call) -> Response:
    """Show one discussion with what was said."""
    repo, number = call.repo(), int(call.part("number"))
    for post in _posts(repo):
        if post["num"] == number:
            comment = {
                "id": f"comment-{number}",
                "type": "comment",
                "createdAt": post["createdAt"],
                "author": post["author"],
                "data": {"edited": False, "hidden": False, "latest": {"raw": post["said"]}},
            }
            shown = {**post, "repo": {"name": repo.id, "type": "model"}, "events": [comment]}
            return JSONResponse(shown)
    raise HubError(404, "Discussion not found")


def _collection(call: Call) -> tuple[str, list[str]]:
    slug = f"{call.part('owner')}/{call.part('title')}"
    if slug not in call.hub.recorded.collections:
        raise HubError(404, "Collection not found")
    return slug, call.hub.recorded.collections[slug]


def _shown(slug: str, items: list[str]) -> Response:
    owner, _, title = slug.partition("/")
    listed = [
        {"_id": f"item-{number}", "id": item, "type": "model", "position": number}
        for number, item in enumerate(items)
    ]
    return JSONResponse(
        {
            "slug": slug,
            "title": title,
            "owner": {"name": owner, "type": "user"},
            "items": listed,
            "lastUpdated": now(),
            "position": 0,
            "private": False,
            "theme": "green",
            "upvotes": 0,
        }
    )


async def collection(call: Call) -> Response:
    """Show a collection."""
    return _shown(*_collection(call))


async def add_item(call: Call) -> Response:
    """Add a model to a collection; whose it is may."""
    slug, items = _collection(call)
    identity, owner = call.caller(), slug.partition("/")[0]
    mine = owner == identity.user or any(
        org["name"] == owner and org["roleInOrg"] != "read"
        for org in call.hub.accounts.orgs_of(identity.user)
    )
    if not mine or not identity.has_scope("write-collections"):
        raise HubError(403, "You don't have the rights to change this collection.")
    item = (await call.json())["item"]["id"]
    if item in items:
        raise HubError(409, "The collection has this item already")
    items.append(item)
    return _shown(slug, items)


COLLECTION = r"/api/collections/(?P<owner>[^/]+)/(?P<title>[^/]+)"
ROUTES: tuple[Route, ...] = (
    route("GET", f"{REPO}/discussions", discussions),
    route("POST", f"{REPO}/discussions", create_discussion),
    route("GET", rf"{REPO}/discussions/(?P<number>\d+)", discussion),
    route("GET", COLLECTION, collection),
    route("POST", f"{COLLECTION}/items", add_item),
)
