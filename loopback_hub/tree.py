"""What is in a repository: its info, its file list, and the state of single paths."""

import json
from typing import Any

import yaml
from starlette.responses import JSONResponse, Response

from .repo import Commit, Entry, Repo, pointer
from .web import REPO, Call, HubError, Route, route


def file_info(call: Call, path: str, entry: Entry) -> dict[str, Any]:
    """A file as the tree endpoints describe it."""
    info: dict[str, Any] = {"type": "file", "path": path, "size": entry.size, "oid": entry.oid}
    if entry.lfs:
        size = len(pointer(entry.sha256, entry.size))
        info["lfs"] = {"oid": entry.sha256, "size": entry.size, "pointerSize": size}
        xet = call.hub.xet.find(entry.sha256)
        if xet is not None and call.hub.settings.tells_xet_hash:
            info["xetHash"] = xet.hash  # what came by LFS has none
    return info


def folders(commit: Commit) -> dict[str, dict[str, Any]]:
    """Every folder of a commit as the tree endpoints describe it."""
    names = {
        "/".join(path.split("/")[:depth])
        for path in commit.files
        for depth in range(1, path.count("/") + 1)
    }
    return {
        name: {"type": "directory", "path": name, "size": 0, "oid": commit.id}
        for name in sorted(names)
    }


async def tree(call: Call) -> Response:
    """List a folder, or everything below it."""
    commit = call.commit(call.repo())
    top = call.part("path").strip("/")
    prefix = f"{top}/" if top else ""
    files = {path: file_info(call, path, entry) for path, entry in commit.files.items()}
    everything = {**folders(commit), **files}
    below = {path: info for path, info in everything.items() if path.startswith(prefix)}
    if prefix and not below:
        raise HubError(404, f"{top} does not exist on {call.part('revision')}", "EntryNotFound")
    if not call.flag("recursive"):
        below = {path: info for path, info in below.items() if "/" not in path[len(prefix) :]}
    return JSONResponse(list(below.values()))


async def paths_info(call: Call) -> Response:
    """Describe those of the named paths that exist."""
    commit = call.commit(call.repo())
    known = folders(commit)
    answer = []
    for path in (await call.form()).get("paths", []):
        if path in commit.files:
            answer.append(file_info(call, path, commit.files[path]))
        elif path.rstrip("/") in known:
            answer.append(known[path.rstrip("/")])
    return JSONResponse(answer)


async def info(call: Call) -> Response:
    """Describe a repository at a revision."""
    repo = call.repo()
    return JSONResponse(repo_info(call, repo, call.commit(repo), blobs=call.flag("blobs")))


def repo_info(call: Call, repo: Repo, commit: Commit, *, blobs: bool = False) -> dict[str, Any]:
    """A repository as the info and search endpoints describe it."""
    settings = repo.settings
    card = card_data(_text(call, commit, "README.md"))
    config = _config(_text(call, commit, "config.json"))
    tags = [*card.get("tags", [])] + [
        f"license:{card['license']}" for _ in range("license" in card)
    ]
    return {
        "_id": f"{repo.kind}-{repo.id}",
        "id": repo.id,
        "modelId": repo.id,
        "author": repo.namespace,
        "sha": commit.id,
        "createdAt": settings["created"],
        "lastModified": commit.date,
        "private": settings["private"],
        "gated": settings["gated"],
        "disabled": False,
        "downloads": 0,
        "likes": 0,
        "tags": tags,
        "library_name": card.get("library_name"),
        "pipeline_tag": card.get("pipeline_tag"),
        "cardData": card,
        "config": {key: config[key] for key in ("architectures", "model_type") if key in config},
        "siblings": [_sibling(path, entry, blobs=blobs) for path, entry in commit.files.items()],
        "usedStorage": sum(entry.size for entry in commit.files.values()),
    }


def _sibling(path: str, entry: Entry, *, blobs: bool) -> dict[str, Any]:
    sibling: dict[str, Any] = {"rfilename": path}
    if blobs:
        sibling |= {"size": entry.size, "blobId": entry.oid}
    if blobs and entry.lfs:
        size = len(pointer(entry.sha256, entry.size))
        sibling["lfs"] = {"sha256": entry.sha256, "size": entry.size, "pointerSize": size}
    return sibling


def _text(call: Call, commit: Commit, path: str) -> str:
    entry = commit.files.get(path)
    if entry is None or entry.lfs:
        return ""
    return call.hub.objects.path(entry.sha256).read_text(errors="replace")


def _config(text: str) -> dict[str, Any]:
    try:
        config = json.loads(text or "{}")
    except ValueError:
        return {}
    return config if isinstance(config, dict) else {}


def card_data(text: str) -> dict[str, Any]:
    """The YAML at the top of a model card; empty when there is none or it does not parse."""
    try:
        card = yaml.safe_load(front_matter(text))
    except yaml.YAMLError:
        return {}
    return card if isinstance(card, dict) else {}


def front_matter(text: str) -> str:
    """The text between the first two `---` lines."""
    if not text.startswith("---"):
        return ""
    return text[3:].partition("\n---")[0]


ROUTES: tuple[Route, ...] = (
    route("GET", REPO, info),
    route("GET", REPO + r"/revision/(?P<revision>[^/]+)", info),
    route("GET", REPO + r"/tree/(?P<revision>[^/]+)(?:/(?P<path>.*))?", tree),
    route("POST", REPO + r"/paths-info/(?P<revision>[^/]+)", paths_info),
)
