"""Jobs and Spaces: nothing runs, every request is written down for tests to read."""

import uuid
from typing import Any

from starlette.responses import JSONResponse, Response

from .repo import now
from .web import REPO, Call, HubError, Route, route


async def _record(call: Call) -> dict[str, Any]:
    payload: dict[str, Any] = await call.json()
    call.hub.recorded.payloads.append((f"{call.request.method} {call.request.url.path}", payload))
    return payload


def _check_namespace(call: Call) -> str:
    namespace = call.part("owner")
    if not call.hub.accounts.may_create(call.caller(), namespace):
        raise HubError(403, f"You don't have the rights to run Jobs under {namespace}")
    return namespace


async def start(call: Call) -> Response:
    """Accept a Job; it stays in the stage RUNNING until a test or a cancel changes that."""
    namespace = _check_namespace(call)
    payload = await _record(call)
    job = {
        **payload,
        "id": uuid.uuid4().hex[:24],
        "createdAt": now(),
        "owner": {"id": f"user-{namespace}", "name": namespace, "type": "user"},
        "status": {"stage": "RUNNING", "message": None},
        "secrets": dict.fromkeys(payload.get("secrets", {})),  # names only, as on the real Hub
    }
    call.hub.recorded.jobs[job["id"]] = job
    return JSONResponse(job)


async def list_jobs(call: Call) -> Response:
    """The Jobs of a namespace, newest first."""
    namespace = _check_namespace(call)
    jobs = [job for job in call.hub.recorded.jobs.values() if job["owner"]["name"] == namespace]
    return JSONResponse(jobs[::-1])


def _job(call: Call) -> dict[str, Any]:
    _check_namespace(call)
    job = call.hub.recorded.jobs.get(call.part("job"))
    if job is None:
        raise HubError(404, "Job not found")
    return job


async def inspect(call: Call) -> Response:
    """One Job."""
    return JSONResponse(_job(call))


async def cancel(call: Call) -> Response:
    """Move a Job to the stage CANCELED."""
    job = _job(call)
    await _record(call)
    job["status"] = {"stage": "CANCELED", "message": None}
    return JSONResponse(job)


async def duplicate_space(call: Call) -> Response:
    """Copy a Space's files to a new Space."""
    source = call.readable_repo()
    wanted = await _record(call)
    target = wanted["repository"]
    caller = call.caller()
    if not call.hub.accounts.may_create(caller, target.split("/")[0]):
        raise HubError(403, "You don't have the rights to create a space under this namespace")
    url = f"{call.hub.endpoint}/{source.kind}/{target}"
    if call.hub.store.repo(source.kind, target) is not None:
        raise HubError(409, "The repository exists", url=url)
    private = wanted.get("visibility", "public") != "public"
    copy = call.hub.store.create(source.kind, target, private=private, created_by=caller.digest)
    copy.commit("refs/heads/main", source.at("main").files, title=f"Duplicate from {source.id}")
    return JSONResponse({"url": url})


async def hardware(call: Call) -> Response:
    """Accept the hardware that a Space is to run on."""
    call.writable_repo()
    wanted = await _record(call)
    return JSONResponse(_runtime(wanted.get("flavor"), wanted.get("sleepTimeSeconds")))


async def runtime(call: Call) -> Response:
    """The state of a Space: it always runs."""
    call.repo()
    return JSONResponse(_runtime("cpu-basic", None))


def _runtime(flavor: str | None, sleep_seconds: int | None) -> dict[str, Any]:
    return {
        "stage": "RUNNING",
        "hardware": {"current": flavor, "requested": flavor},
        "gcTimeout": sleep_seconds,
    }


JOBS = "/api/jobs/(?P<owner>[^/]+)"
ROUTES: tuple[Route, ...] = (
    route("POST", JOBS, start),
    route("GET", JOBS, list_jobs),
    route("GET", JOBS + "/(?P<job>[^/]+)", inspect),
    route("POST", JOBS + "/(?P<job>[^/]+)/cancel", cancel),
    route("POST", REPO + "/duplicate", duplicate_space),
    route("POST", REPO + "/hardware", hardware),
    route("GET", REPO + "/runtime", runtime),
)
