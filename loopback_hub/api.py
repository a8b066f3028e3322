"""The account and repository endpoints: who am I, create, delete, settings, search, Xet tokens."""

import asyncio
import re
import secrets
import time
from typing import Any

import yaml
from starlette.responses import JSONResponse, Response

from .community import open_to
from .lfs import check_quota
from .tree import front_matter, repo_info
from .web import REPO, Call, HubError, Route, route

_REPO_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


async def whoami(call: Call) -> Response:
    """Say whose token came with the request."""
    return JSONResponse(call.hub.accounts.whoami(call.caller()))


async def create(call: Call) -> Response:
    """Create a repository, public unless `visibility` says otherwise."""
    wanted = await call.json()
    caller = call.caller()
    kind, repo_id = _named(call, wanted)
    existing = call.hub.store.repo(kind, repo_id)
    if not call.hub.accounts.may_create(caller, repo_id.split("/")[0]):
        raise HubError(403, f"You don't have the rights to create a repo under {repo_id}")
    url = f"{call.hub.endpoint}/{'' if kind == 'models' else kind + '/'}{repo_id}"
    if existing is not None:
        raise HubError(409, f"You already created this repo: {repo_id}", url=url)
    private = wanted.get("visibility", "public") != "public"
    call.hub.store.create(kind, repo_id, private=private, created_by=caller.maker)
    return JSONResponse({"url": url, "name": repo_id, "id": repo_id})


def _named(call: Call, wanted: dict[str, Any]) -> tuple[str, str]:
    repo_id = f"{wanted.get('organization') or call.caller().user}/{wanted['name']}"
    if not _REPO_ID.fullmatch(repo_id):
        raise HubError(400, f"Invalid repo id: {repo_id}")
    return f"{wanted.get('type') or 'model'}s", repo_id


async def delete(call: Call) -> Response:
    """Delete a repository, unless this Hub refuses that altogether."""
    kind, repo_id = _named(call, await call.json())
    repo = call.hub.store.repo(kind, repo_id)
    if repo is None or not call.hub.accounts.may_see(call.identity, repo):
        raise HubError(404, "Repository not found", "RepoNotFound")
    if not call.hub.settings.allow_delete or not call.hub.accounts.may_write(call.caller(), repo):
        raise HubError(403, f"You don't have the rights to delete {repo_id}")
    call.hub.store.delete(repo)
    return JSONResponse({"success": True})


async def settings(call: Call) -> Response:
    """Change visibility and gating."""
    repo = call.writable_repo()
    wanted = await call.json()
    changes: dict[str, Any] = {}
    if "visibility" in wanted:
        changes["private"] = wanted["visibility"] != "public"
    if "gated" in wanted:
        changes["gated"] = wanted["gated"]
    repo.update_settings(**changes)
    return JSONResponse(changes)


async def auth_check(call: Call) -> Response:
    """Say whether the caller may download, or write."""
    if call.part("need"):
        call.writable_repo()
    else:
        call.readable_repo()
    return JSONResponse({"success": True})


async def search(call: Call) -> Response:
    """List the repositories that the caller may see and whose id contains the searched words."""
    query = call.request.query_params
    words = query.get("search", "").lower().split()
    author = query.get("author")
    answers = []
    for repo in call.hub.store.repos(call.part("kind")):
        fits = all(word in repo.id.lower() for word in words) and author in (None, repo.namespace)
        if fits and call.hub.accounts.may_see(call.identity, repo):
            answers.append(repo_info(call, repo, repo.at("main")))
    wanted_tags = query.getlist("filter")
    tagged = [answer for answer in answers if set(wanted_tags) <= set(answer["tags"])]
    return JSONResponse(tagged[: int(query.get("limit", "1000"))])


async def validate_yaml(call: Call) -> Response:
    """Check the metadata of a model card."""
    content = (await call.json()).get("content", "")
    try:
        card = yaml.safe_load(front_matter(content))
    except yaml.YAMLError as error:
        errors = [{"message": f"YAML does not parse: {error}"}]
        return JSONResponse({"errors": errors, "warnings": []}, 400)
    errors = [{"message": message} for message in _card_errors(card or {})]
    warnings = [] if card else [{"message": "empty or missing yaml metadata in repo card"}]
    return JSONResponse({"errors": errors, "warnings": warnings}, 400 if errors else 200)


def _card_errors(card: Any) -> list[str]:
    if not isinstance(card, dict):
        return ['"metadata" must be an object']
    errors = []
    relation = card.get("base_model_relation")
    if relation not in (None, "adapter", "merge", "quantized", "finetune"):
        errors.append('"base_model_relation" must be one of [adapter, merge, quantized, finetune]')
    if not isinstance(card.get("tags", []), list):
        errors.append('"tags" must be an array')
    if not isinstance(card.get("license", ""), str | list):
        errors.append('"license" must be a string')
    return errors


async def xet_token(call: Call) -> Response:
    """Give access to Xet storage: a store of the client's own to write, a snapshot to read."""
    if call.part("need") == "write":
        repo = open_to(call) if call.flag("create_pr") else call.writable_repo()
        if repo.settings["private"]:
            check_quota(call, repo.namespace, 1)
        client = call.request.scope["state"]["connection"].pid
        url = call.hub.xet.writing_url(client or "unknown")
    else:
        repo = call.readable_repo()
        wanted = [entry.sha256 for entry in call.commit(repo).files.values() if entry.lfs]
        url = await asyncio.to_thread(call.hub.xet.reading_url, wanted)
    token, expires = f"xet-{secrets.token_hex(8)}", int(time.time()) + 3600
    headers = {
        "X-Xet-Cas-Url": url,
        "X-Xet-Access-Token": token,
        "X-Xet-Token-Expiration": str(expires),
    }
    return JSONResponse({"casUrl": url, "accessToken": token, "exp": expires}, headers=headers)


async def duplicate_files(call: Call) -> Response:
    """Let another repository use files of this one's Xet storage; contents are shared here."""
    call.readable_repo()
    failed = [
        {"sha256": file["sha256"], "error": "not found"}
        for file in (await call.json())["files"]
        if (found := call.hub.xet.find(file["sha256"])) is None or found.hash != file["xetHash"]
    ]
    return JSONResponse({"success": [], "failed": failed})


ROUTES: tuple[Route, ...] = (
    route("GET", "/api/whoami-v2", whoami),
    route("POST", "/api/repos/create", create),
    route("DELETE", "/api/repos/delete", delete),
    route("POST", "/api/validate-yaml", validate_yaml),
    route("GET", "/api/(?P<kind>models|datasets|spaces)", search),
    route("PUT", REPO + "/settings", settings),
    route("GET", REPO + "/auth-check(?:/(?P<need>write))?", auth_check),
    route("GET", REPO + "/xet-(?P<need>read|write)-token/(?P<revision>[^/]+)", xet_token),
    route("POST", REPO + "/lfs-files/duplicate", duplicate_files),
)
