"""Changing a repository: preupload, commits, branches, tags, history."""

import base64
import json
from collections.abc import Iterator
from typing import Any

from starlette.responses import JSONResponse, Response

from . import community
from .lfs import check_quota
from .repo import Commit, Entry, Repo, StaleParentError
from .store import is_large
from .web import REPO, Call, HubError, Route, route


def _repo_for_commit(call: Call) -> Repo:
    """Whoever may read may open a pull request; everything else needs the right to write."""
    if not call.flag("create_pr"):
        return call.writable_repo()
    return community.open_to(call)


async def preupload(call: Call) -> Response:
    """Say which files go to large storage and which into the commit itself."""
    commit = call.commit(_repo_for_commit(call))
    answers = []
    for file in (await call.json())["files"]:
        known = commit.files.get(file["path"])
        large = is_large(file["path"], file["size"], base64.b64decode(file["sample"]))
        oid = (known.sha256 if known.lfs else known.oid) if known else None
        mode = "lfs" if large else "regular"
        answers.append(
            {"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid}
        )
    return JSONResponse({"files": answers})


async def commit(call: Call) -> Response:
    """Apply a list of changes as one commit, or as none."""
    repo = _repo_for_commit(call)
    base = call.commit(repo)
    lines = [json.loads(line) for line in (await call.request.body()).splitlines() if line.strip()]
    header = next(line["value"] for line in lines if line["key"] == "header")
    operations = [line for line in lines if line["key"] != "header"]
    changes = {path: entry for line in operations for path, entry in _changes(call, base, line)}
    if repo.settings["private"]:
        check_quota(call, repo.namespace, 0)
    page = call.hub.endpoint + repo.page
    answer: dict[str, Any] = {"success": True, "hookOutput": ""}
    revision = call.part("revision")
    ref: str | None = repo.ref_of(revision)
    if call.flag("create_pr"):
        number = community.next_number(repo)
        ref = f"refs/pr/{number}"
        answer["pullRequestUrl"] = f"{page}/discussions/{number}"
    if ref is None:
        raise HubError(400, f"{revision} is not a branch")
    try:
        made = repo.commit(
            ref,
            changes,
            title=header["summary"],
            description=header.get("description", ""),
            author=call.caller().user,
            # A pull request starts from the parent, wherever the branch is by now.
            base=header.get("parentCommit") or revision if call.flag("create_pr") else revision,
            expected_parent=header.get("parentCommit"),
        )
    except StaleParentError as error:
        raise HubError(412, "A commit has happened since. Please refresh and try again.") from error
    return JSONResponse({**answer, "commitOid": made.id, "commitUrl": f"{page}/commit/{made.id}"})


def _changes(call: Call, base: Commit, line: dict[str, Any]) -> Iterator[tuple[str, Entry | None]]:
    value = line["value"]
    path = value["path"]
    if line["key"] == "file":
        content = base64.b64decode(value["content"])
        call.hub.objects.add_bytes(content)
        yield path, Entry.regular(content)
    elif line["key"] == "lfsFile":
        yield path, _large(call, value)
    elif line["key"] == "deletedFile":
        if path not in base.files:
            raise HubError(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
        yield path, None
    elif line["key"] == "deletedFolder":
        yield from ((name, None) for name in base.files if name.startswith(path.rstrip("/") + "/"))
    else:
        raise HubError(400, f"Unknown operation {line['key']!r}")


def _large(call: Call, value: dict[str, Any]) -> Entry:
    sha256 = value["oid"]
    xet = call.hub.xet.find(sha256)
    if sha256 in call.hub.objects:
        size = call.hub.objects.size(sha256)
    elif xet is not None:
        size = xet.size
    else:
        raise HubError(400, f"LFS pointer pointed to a file that does not exist: {value['path']}")
    if value.get("size", size) != size:  # a copy comes without a size
        raise HubError(400, f"{value['path']} has {size} bytes, not {value['size']}")
    return Entry.large(sha256, size)


async def refs(call: Call) -> Response:
    """List branches, tags and pull requests."""
    named: dict[str, list[dict[str, str]]] = {"heads": [], "tags": [], "pr": []}
    for ref, target in call.repo().refs().items():
        kind, name = ref.split("/", 2)[1:]
        named[kind].append({"name": name, "ref": ref, "targetCommit": target})
    answer = {"branches": named["heads"], "converts": [], "tags": named["tags"]}
    return JSONResponse(
        answer | ({"pullRequests": named["pr"]} if call.flag("include_prs") else {})
    )


async def history(call: Call) -> Response:
    """List the commits behind a revision, newest first."""
    repo = call.repo()
    commits = [
        {
            "id": commit.id,
            "title": commit.title,
            "message": commit.description,
            "authors": [{"user": commit.author}],
            "date": commit.date,
        }
        for commit in repo.history(call.commit(repo).id)
    ]
    return JSONResponse(commits, headers={"X-Total-Count": str(len(commits))})


async def create_branch(call: Call) -> Response:
    """Create a branch at a revision, by default at main."""
    repo = call.writable_repo()
    start = (await call.json()).get("startingPoint")
    return _create_ref(call, repo, f"refs/heads/{call.part('branch')}", start or "main")


async def create_tag(call: Call) -> Response:
    """Create a tag at a revision."""
    repo = call.writable_repo()
    return _create_ref(call, repo, f"refs/tags/{(await call.json())['tag']}", call.part("revision"))


def _create_ref(call: Call, repo: Repo, ref: str, revision: str) -> Response:
    if ref in repo.refs():
        raise HubError(409, f"Reference already exists: {ref}")
    found = repo.ref_of(revision)
    commit_id = repo.refs()[found] if found else revision
    if not found and not (repo.root / "commits" / f"{commit_id}.json").exists():
        raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
    repo.set_ref(ref, commit_id)
    return JSONResponse({"success": True})


async def delete_ref(call: Call) -> Response:
    """Delete a branch or a tag; main cannot be deleted."""
    repo = call.writable_repo()
    folder = "heads" if call.parts.get("branch") else "tags"
    ref = f"refs/{folder}/{call.part('branch') or call.part('tag')}"
    if ref == "refs/heads/main":
        raise HubError(403, "The main branch cannot be deleted")
    if ref not in repo.refs():
        raise HubError(404, f"Reference does not exist: {ref}", "RevisionNotFound")
    repo.set_ref(ref, None)
    return JSONResponse({"success": True})


async def squash(call: Call) -> Response:
    """Replace a branch's history by one commit."""
    repo = call.writable_repo()
    head = call.commit(repo)
    ref = repo.ref_of(call.part("revision"))
    if ref is None:
        raise HubError(400, f"{call.part('revision')} is not a branch")
    message = (await call.json()).get("message", "Squash")
    repo.write(ref, head.files, title=message, parent=None, author=call.caller().user)
    return JSONResponse({"success": True})


REVISION = r"/(?P<revision>[^/]+)"
ROUTES: tuple[Route, ...] = (
    route("POST", f"{REPO}/preupload{REVISION}", preupload),
    route("POST", f"{REPO}/commit{REVISION}", commit),
    route("GET", f"{REPO}/refs", refs),
    route("GET", f"{REPO}/commits{REVISION}", history),
    route("POST", f"{REPO}/branch/(?P<branch>[^/]+)", create_branch),
    route("DELETE", f"{REPO}/branch/(?P<branch>[^/]+)", delete_ref),
    route("POST", f"{REPO}/tag{REVISION}", create_tag),
    route("DELETE", f"{REPO}/tag/(?P<tag>[^/]+)", delete_ref),
    route("POST", f"{REPO}/super-squash{REVISION}", squash),
)
