"""Jobs and Spaces: every request is written down for tests to read; Jobs can be run for real."""

import asyncio
import json
import re
import uuid
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from starlette.responses import JSONResponse, Response, StreamingResponse

from .job_runner import JobRecord, free_port
from .repo import now
from .web import REPO, Call, HubError, Route, route

_LOG_POLL_SECONDS = 0.02
_NETWORK_NAME = re.compile("[a-z0-9-]{1,46}")


async def _record(call: Call) -> dict[str, Any]:
    payload: dict[str, Any] = await call.json()
    call.hub.recorded.payloads.append((f"{call.request.method} {call.request.url.path}", payload))
    return payload


def _check_namespace(call: Call) -> str:
    namespace, caller = call.part("owner"), call.caller()
    # An app's token may if its user agreed to that; a token of the user's own, if it may write.
    may = caller.role != "contribute" if caller.scopes is None else caller.has_scope("jobs")
    if not may or not call.hub.accounts.may_create(caller, namespace):
        raise HubError(403, f"You don't have the rights to run Jobs under {namespace}")
    return namespace


async def start(call: Call) -> Response:
    """Accept a Job; unless Jobs are run, it stays RUNNING until a test or a cancel changes that."""
    namespace = _check_namespace(call)
    payload = await _record(call)
    if payload.get("flavor") not in {machine["name"] for machine in call.hub.settings.hardware}:
        raise HubError(400, f"Invalid flavor: {payload.get('flavor')}")
    network = payload.get("network") or {}
    for name in (network.get("group", "a"), *network.get("aliases", ())):
        if not _NETWORK_NAME.fullmatch(name):
            raise HubError(400, f"Invalid network name: {name}")
    answer = {
        **payload,
        "id": uuid.uuid4().hex[:24],
        "createdAt": now(),
        "owner": {"id": f"user-{namespace}", "name": namespace, "type": "user"},
        "status": {"stage": "RUNNING", "message": None},
        "secrets": dict.fromkeys(payload.get("secrets", {})),  # names only, as on the real Hub
    }
    job = JobRecord(answer)
    if job.group:
        others = [one for one in call.hub.recorded.jobs.values() if one.group == job.group]
        job.port = others[0].port if others else free_port()
    call.hub.recorded.jobs[answer["id"]] = job
    if call.hub.settings.run_jobs is not None:
        job.say("===== Job started =====")
        volumes = {volume["mountPath"]: _files(call, volume) for volume in payload["volumes"]}
        env = {**payload["environment"], **payload["secrets"], **call.hub.settings.run_jobs}
        folder = call.hub.objects.root.parent / "jobs" / answer["id"]
        await asyncio.to_thread(job.run, folder, volumes, env)
    return JSONResponse(answer)


def _files(call: Call, volume: dict[str, Any]) -> dict[str, Path]:
    """What a volume shows: the files of a repository that the caller may download."""
    repo = call.hub.store.repo(f"{volume['type']}s", volume["source"])
    if repo is None or not call.hub.accounts.may_see(call.identity, repo):
        raise HubError(404, f"Volume {volume['source']} not found", "RepoNotFound")
    files = repo.at(volume.get("revision") or "main").files
    for entry in files.values():
        if entry.sha256 not in call.hub.objects:
            call.hub.xet.materialise(entry.sha256)
    return {path: call.hub.objects.path(entry.sha256) for path, entry in files.items()}


async def list_jobs(call: Call) -> Response:
    """The Jobs of a namespace, newest first, with the stages and labels that are asked for."""
    namespace, query = _check_namespace(call), call.request.query_params
    stages = query.getlist("stage")
    labels = dict(label.split("=", 1) for label in query.getlist("label"))
    jobs = [
        job.told()
        for job in call.hub.recorded.jobs.values()
        if job.answer["owner"]["name"] == namespace
        and (not stages or job.answer["status"]["stage"] in stages)
        and labels.items() <= (job.answer.get("labels") or {}).items()
    ]
    return JSONResponse(jobs[::-1])


async def machines(call: Call) -> Response:
    """The flavours that Jobs may have."""
    return JSONResponse(call.hub.settings.hardware)


def _job(call: Call) -> JobRecord:
    namespace = _check_namespace(call)
    job = call.hub.recorded.jobs.get(call.part("job"))
    if job is None or job.answer["owner"]["name"] != namespace:
        raise HubError(404, "Job not found")
    return job


async def inspect(call: Call) -> Response:
    """One Job."""
    return JSONResponse(_job(call).told())


async def logs(call: Call) -> Response:
    """A Job's log as server-sent events, from its beginning until the Job has ended."""
    job = _job(call)

    async def events() -> AsyncIterator[str]:
        sent = 0
        while True:
            ended = job.ended  # asked before the log, so that no last line is missed
            for line in job.log[sent:]:
                yield f"data: {json.dumps(line)}\n\n"
                sent += 1
            if ended:
                return
            await asyncio.sleep(_LOG_POLL_SECONDS)

    return StreamingResponse(events(), media_type="text/event-stream")


async def cancel(call: Call) -> Response:
    """Move a Job to the stage CANCELED, and end its process."""
    job = _job(call)
    await _record(call)
    job.end("CANCELED")
    return JSONResponse(job.answer)


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
    copy = call.hub.store.create(source.kind, target, private=private, created_by=caller.maker)
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
    route("GET", "/api/jobs/hardware", machines),
    route("POST", JOBS, start),
    route("GET", JOBS, list_jobs),
    route("GET", JOBS + "/(?P<job>[^/]+)", inspect),
    route("GET", JOBS + "/(?P<job>[^/]+)/logs", logs),
    route("POST", JOBS + "/(?P<job>[^/]+)/cancel", cancel),
    route("POST", REPO + "/duplicate", duplicate_space),
    route("POST", REPO + "/hardware", hardware),
    route("GET", REPO + "/runtime", runtime),
)
