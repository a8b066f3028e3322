"""Downloads: signed URLs of large contents on a port of their own, and the redirects to them."""

import asyncio
from urllib.parse import quote

from starlette.responses import RedirectResponse, Response

from .lfs import OID, check_signature
from .repo import Commit, Entry, Repo
from .web import GIT, Call, FileAnswer, HubError, Route, route


async def resolve(call: Call) -> Response:
    """Serve a small file, or redirect to where a large one can be downloaded for a while."""
    repo = call.readable_repo()
    commit = call.commit(repo)
    path = call.part("path")
    entry = commit.files.get(path)
    if entry is None:
        raise HubError(404, f"Entry not found: {path}", "EntryNotFound")
    headers = {"X-Repo-Commit": commit.id, "ETag": f'"{entry.oid}"'}
    if not entry.lfs:
        return FileAnswer(call.hub.objects.path(entry.sha256), call.request, headers)
    return _redirect(call, repo, commit, entry, headers)


def _redirect(
    call: Call, repo: Repo, commit: Commit, entry: Entry, headers: dict[str, str]
) -> Response:
    signed = call.hub.signer.sign("GET", f"/file/{entry.sha256}", call.hub.settings.url_lifetime)
    headers |= {"X-Linked-Size": str(entry.size), "X-Linked-ETag": f'"{entry.sha256}"'}
    xet = call.hub.xet.find(entry.sha256)
    if xet is not None:
        auth = f"{call.hub.endpoint}/api/{repo.kind}/{repo.id}/xet-read-token/{quote(commit.id)}"
        headers |= {"X-Xet-Hash": xet.hash, "Link": f'<{auth}>; rel="xet-auth"'}
    return RedirectResponse(call.hub.cdn + signed, status_code=302, headers=headers)


async def download(call: Call) -> Response:
    """Serve the bytes of a large content, whole or a range."""
    check_signature(call, call.hub.signer)
    sha256 = call.part("oid")
    if sha256 not in call.hub.objects:
        if call.hub.xet.find(sha256) is None:
            raise HubError(404, "No such object")
        await asyncio.to_thread(call.hub.xet.materialise, sha256)
    return FileAnswer(call.hub.objects.path(sha256), call.request, {"ETag": f'"{sha256}"'})


API_ROUTES: tuple[Route, ...] = (
    route("GET|HEAD", GIT + r"/resolve/(?P<revision>[^/]+)/(?P<path>.+)", resolve),
)
CDN_ROUTES: tuple[Route, ...] = (route("GET|HEAD", f"/file/{OID}", download),)
