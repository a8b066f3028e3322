"""Buckets: files without git or commits, each named by its Xet hash; they may change at any time.

A bucket is kept as a repository of kind ``buckets``, of which nothing but the newest state is seen.
"""

import asyncio
import secrets
import time
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlencode

from starlette.responses import JSONResponse, RedirectResponse, Response

from .repo import Commit, Entry
from .services import Services
from .web import Call, FileAnswer, HubError, Route, route

_API = r"/api/(?P<kind>buckets)/(?P<namespace>[^/]+)/(?P<name>[^/]+)"
_PAGE = r"/(?P<kind>buckets)/(?P<namespace>[^/]+)/(?P<name>[^/]+)"
# Entries on a page of a listing.
PAGE = 1000


async def info(call: Call) -> Response:
    """Describe a bucket."""
    repo = call.repo()
    files = _files(repo.at("main"))
    return JSONResponse(
        {
            "id": repo.id,
            "private": repo.settings["private"],
            "createdAt": repo.settings["created"],
            "size": sum(entry.size for entry in files.values()),
            "totalFiles": len(files),
        }
    )


async def tree(call: Call) -> Response:
    """List what begins with a prefix, whether a folder ends there or not; page by page."""
    commit = call.commit(call.repo())
    prefix = call.part("prefix")
    found = {path: entry for path, entry in _files(commit).items() if path.startswith(prefix)}
    depth = None if call.flag("recursive") else prefix.count("/") + bool(prefix) + 1
    listed: dict[str, Entry | None] = {}
    for path, entry in found.items():
        top = "/".join(path.split("/")[:depth])
        listed[top] = entry if top == path else None
    first = int(call.request.query_params.get("cursor", "0"))
    page = [
        {"type": "directory", "path": path, "uploadedAt": commit.date}
        if entry is None
        else await _described(call.hub, commit, path, entry)
        for path, entry in list(listed.items())[first : first + PAGE]
    ]
    headers = {}
    if first + PAGE < len(listed):
        query = urlencode({**call.request.query_params, "cursor": first + PAGE})
        here = call.hub.endpoint + call.request.scope["raw_path"].decode()
        headers["Link"] = f'<{here}?{query}>; rel="next"'
    return JSONResponse(page, headers=headers)


async def paths_info(call: Call) -> Response:
    """Describe those of the named files that exist."""
    commit = call.commit(call.repo())
    files = _files(commit)
    wanted = [path for path in (await call.json()).get("paths", []) if path in files]
    return JSONResponse([await _described(call.hub, commit, path, files[path]) for path in wanted])


async def resolve(call: Call) -> Response:
    """Redirect to where a file can be downloaded for a while, as it is now."""
    repo = call.readable_repo()
    path = call.part("path")
    entry = _files(repo.at("main")).get(path)
    if entry is None:
        raise HubError(404, f"Entry not found: {path}", "EntryNotFound")
    headers = {
        "X-Xet-Hash": await _xet_hash(call.hub, entry),
        "X-Linked-Size": str(entry.size),
        "Link": f'<{call.hub.endpoint}/api/buckets/{repo.id}/xet-read-token>; rel="xet-auth"',
    }
    if not entry.size:
        return FileAnswer(call.hub.objects.path(entry.sha256), call.request, headers)
    signed = call.hub.signer.sign("GET", f"/file/{entry.sha256}", call.hub.settings.url_lifetime)
    return RedirectResponse(call.hub.cdn + signed, status_code=302, headers=headers)


async def xet_token(call: Call) -> Response:
    """Give access to Xet storage: a snapshot to read."""
    repo = call.readable_repo()
    wanted = [entry.sha256 for entry in _files(repo.at("main")).values() if entry.size]
    url = await asyncio.to_thread(call.hub.xet.reading_url, wanted)
    token, expires = f"xet-{secrets.token_hex(8)}", int(time.time()) + 3600
    headers = {
        "X-Xet-Cas-Url": url,
        "X-Xet-Access-Token": token,
        "X-Xet-Token-Expiration": str(expires),
    }
    return JSONResponse({"casUrl": url, "accessToken": token, "exp": expires}, headers=headers)


def _files(commit: Commit) -> Mapping[str, Entry]:
    """Return a bucket's files, without what git keeps for itself."""
    return {path: entry for path, entry in commit.files.items() if path != ".gitattributes"}


async def _described(hub: Services, commit: Commit, path: str, entry: Entry) -> dict[str, Any]:
    return {
        "type": "file",
        "path": path,
        "size": entry.size,
        "xetHash": await _xet_hash(hub, entry),
        "mtime": commit.date,
        "uploadedAt": commit.date,
    }


async def _xet_hash(hub: Services, entry: Entry) -> str:
    """Return what Xet calls a content; a bucket holds nothing that is not in Xet storage."""
    if not entry.size:
        return "0" * 64
    if hub.xet.find(entry.sha256) is None:
        await asyncio.to_thread(hub.xet.ingest, entry.sha256)
    found = hub.xet.find(entry.sha256)
    assert found is not None
    return found.hash


ROUTES: tuple[Route, ...] = (
    route("GET", _API, info),
    route("GET", _API + r"/tree(?:/(?P<prefix>.*))?", tree),
    route("POST", _API + r"/paths-info", paths_info),
    route("GET", _API + r"/xet-read-token", xet_token),
    route("GET|HEAD", _PAGE + r"/resolve/(?P<path>.+)", resolve),
)
