"""Uploads over git-LFS: the batch endpoint, signed PUTs whole or in parts, completion."""

import asyncio
import hashlib
from pathlib import Path
from urllib.parse import urlsplit

from starlette.responses import JSONResponse, Response

from .signing import Signer
from .web import GIT, Call, HubError, Route, route


async def batch(call: Call) -> Response:
    """Say for each object where to upload it, or that it is here already."""
    asked = await call.json()
    # Without a branch it is for a pull request, which whoever may read may open.
    repo = call.writable_repo() if "ref" in asked else call.repo()
    call.caller()
    objects = asked["objects"]
    missing = [item for item in objects if not _is_here(call, item["oid"])]
    check_quota(call, repo.namespace, sum(item["size"] for item in missing))
    answers = []
    for item in objects:
        answer = {"oid": item["oid"], "size": item["size"]}
        if item in missing:
            verify = {"href": f"{call.hub.endpoint}{repo.page}.git/info/lfs/objects/verify"}
            answer["actions"] = {
                "upload": _upload(call, item["oid"], item["size"]),
                "verify": verify,
            }
        answers.append(answer)
    return JSONResponse(
        {"transfer": "basic", "objects": answers}, media_type="application/vnd.git-lfs+json"
    )


def _is_here(call: Call, oid: str) -> bool:
    return oid in call.hub.objects or call.hub.xet.find(oid) is not None


def check_quota(call: Call, namespace: str, more_bytes: int) -> None:
    """Refuse when a namespace's private storage would overflow."""
    quota = call.hub.accounts.quota(namespace)
    if quota is not None and call.hub.store.used(namespace) + more_bytes > quota:
        raise HubError(
            403,
            "Private repository storage limit reached, please upgrade your plan to increase it.",
        )


def _upload(call: Call, oid: str, size: int) -> dict[str, object]:
    settings, signer = call.hub.settings, call.hub.signer
    path = f"/upload/{oid}"
    if size <= settings.multipart_over:
        return {
            "href": call.hub.cdn + signer.sign("PUT", path, settings.url_lifetime, size=str(size))
        }
    step = settings.part_bytes
    urls = {
        f"{number:05d}": call.hub.cdn
        + signer.sign(
            "PUT", path, settings.url_lifetime, part=str(number), offset=str(offset), size=str(size)
        )
        for number, offset in enumerate(range(0, size, step), 1)
    }
    done = signer.sign("POST", path, settings.url_lifetime, size=str(size))
    return {"href": call.hub.endpoint + done, "header": {"chunk_size": str(step), **urls}}


def check_signature(call: Call, signer: Signer) -> None:
    """Refuse a request whose URL was not signed for it or has expired, as object stores do."""
    path = urlsplit(str(call.request.url)).path
    if not signer.allows(call.request.method, path, call.request.query_params):
        raise HubError(403, "Request has expired")


async def put(call: Call) -> Response:
    """Take a whole object, or one part of it at its offset."""
    check_signature(call, call.hub.signer)
    query = call.request.query_params
    oid = call.part("oid")
    partial = _partial(call, oid) if "part" in query else call.hub.objects.temporary()
    hashed = hashlib.sha256() if call.hub.settings.verify_uploads else None
    partial.touch()
    with partial.open("r+b", buffering=0) as file:
        file.seek(int(query.get("offset", "0")))
        async for piece in call.request.stream():
            file.write(piece)
            if hashed is not None:
                hashed.update(piece)
        etag = hashed.hexdigest() if hashed is not None else str(file.tell())
    if "part" in query:
        (partial.parent / query["part"]).write_text(etag)
    else:
        _adopt(call, partial, oid, int(query["size"]), found=etag if hashed is not None else None)
    return Response(headers={"ETag": f'"{etag}"'})


def _partial(call: Call, oid: str) -> Path:
    folder = call.hub.objects.root / "parts" / oid
    folder.mkdir(parents=True, exist_ok=True)
    return folder / "content"


def _adopt(call: Call, written: Path, oid: str, size: int, *, found: str | None) -> None:
    if written.stat().st_size != size or found not in (None, oid):
        written.unlink()
        raise HubError(400, "The content does not match its announced size and SHA-256")
    call.hub.objects.adopt(written, oid)


async def complete(call: Call) -> Response:
    """Make one object of its uploaded parts."""
    check_signature(call, call.hub.signer)
    oid = call.part("oid")
    if oid in call.hub.objects:  # a repeated call after a lost answer
        return JSONResponse({"success": True})
    content = _partial(call, oid)
    for part in (await call.json())["parts"]:
        marker = content.parent / str(part["partNumber"])
        if not marker.exists() or marker.read_text() != part["etag"].strip('"'):
            raise HubError(400, f"Part {part['partNumber']} is not here or has another ETag")
    found = await asyncio.to_thread(_sha256, content) if call.hub.settings.verify_uploads else None
    _adopt(call, content, oid, int(call.request.query_params["size"]), found=found)
    return JSONResponse({"success": True})


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


async def verify(call: Call) -> Response:
    """Confirm that an object arrived in its full size."""
    call.writable_repo()
    wanted = await call.json()
    objects = call.hub.objects
    if wanted["oid"] not in objects or objects.size(wanted["oid"]) != wanted["size"]:
        raise HubError(404, "The object is not here")
    return JSONResponse({"success": True})


OID = r"(?P<oid>[0-9a-f]{64})"
API_ROUTES: tuple[Route, ...] = (
    route("POST", GIT + r"\.git/info/lfs/objects/batch", batch),
    route("POST", GIT + r"\.git/info/lfs/objects/verify", verify),
    route("POST", f"/upload/{OID}", complete),
)
CDN_ROUTES: tuple[Route, ...] = (route("PUT", f"/upload/{OID}", put),)
