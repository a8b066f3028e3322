"""Requests, answers and routes: what the handlers of the Hub's endpoints are written with."""

import json
import os
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from .accounts import Identity
from .repo import Commit, Repo, RevisionNotFoundError
from .services import Services

PIECE_BYTES = 256 * 1024
REPO = r"/api/(?P<kind>models|datasets|spaces)/(?P<namespace>[^/]+)/(?P<name>[^/]+)"
GIT = r"(?:/(?P<kind>datasets|spaces))?/(?P<namespace>[^/]+)/(?P<name>[^/]+)"


class HubError(Exception):
    """An answer of the Hub other than success."""

    def __init__(self, status: int, message: str, code: str | None = None, **body: Any) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.body = status, message, code, body

    def response(self) -> Response:
        """The answer, with the headers from which huggingface_hub makes its exceptions."""
        headers = {"X-Error-Message": self.message.encode("ascii", "replace").decode()}
        if self.code is not None:
            headers["X-Error-Code"] = self.code
        return JSONResponse({"error": self.message, **self.body}, self.status, headers)


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One request to an endpoint: the parts of its path, who asks, and the Hub that is asked."""

    hub: Services
    request: Request
    parts: Mapping[str, str | None]
    identity: Identity | None

    def part(self, name: str) -> str:
        """A named part of the path, percent-decoded; empty when the route has none."""
        return unquote(self.parts.get(name) or "")

    def flag(self, name: str) -> bool:
        """Whether a query parameter is set to something true."""
        return self.request.query_params.get(name, "").lower() in ("1", "true")

    async def json(self) -> Any:
        """The body as JSON."""
        try:
            return json.loads(await self.request.body() or b"{}")
        except ValueError as error:
            raise HubError(400, "The body is not JSON") from error

    async def form(self) -> dict[str, list[str]]:
        """The body as a URL-encoded form."""
        return parse_qs((await self.request.body()).decode())

    def caller(self) -> Identity:
        """Who asks; anonymous callers are refused."""
        if self.identity is None:
            raise HubError(401, "Invalid username or password.")
        return self.identity

    def repo(self) -> Repo:
        """The repository in the path, if the caller may know of it."""
        kind = self.parts.get("kind") or "models"
        repo = self.hub.store.repo(kind, f"{self.part('namespace')}/{self.part('name')}")
        if repo is None or not self.hub.accounts.may_see(self.identity, repo):
            # The real Hub does not tell a stranger whether a private repository exists.
            status = 401 if self.identity is None else 404
            raise HubError(status, "Repository not found", "RepoNotFound")
        return repo

    def readable_repo(self) -> Repo:
        """The repository in the path, if the caller may download from it."""
        repo = self.repo()
        if not self.hub.accounts.may_download(self.identity, repo):
            status = 401 if self.identity is None else 403
            raise HubError(status, f"Access to model {repo.id} is restricted.", "GatedRepo")
        return repo

    def writable_repo(self) -> Repo:
        """The repository in the path, if the caller may change it."""
        repo = self.repo()
        if not self.may_write(repo):
            raise HubError(403, f"You don't have the rights to write to {repo.id}.")
        return repo

    def may_write(self, repo: Repo) -> bool:
        """Whether the caller may change a repository."""
        return self.hub.accounts.may_write(self.caller(), repo)

    def commit(self, repo: Repo) -> Commit:
        """The commit that the path's revision names."""
        try:
            return repo.at(self.part("revision") or "main")
        except RevisionNotFoundError as error:
            raise HubError(404, f"Invalid rev id: {error}", "RevisionNotFound") from error


Handler = Callable[[Call], Awaitable[Response]]


@dataclass(frozen=True, slots=True)
class Route:
    """Requests whose method and raw path match, and what handles them."""

    method: str
    path: re.Pattern[str]
    handler: Handler


def route(method: str, path: str, handler: Handler) -> Route:
    """A route; the path is a regular expression over the percent-encoded path.

    Revisions arrive as `refs%2Fpr%2F1`: decoding the path before matching would tear them apart.
    """
    return Route(method, re.compile(path), handler)


class Router:
    """The ASGI application of a list of routes."""

    def __init__(self, hub: Services, routes: Sequence[Route]) -> None:
        self._hub, self._routes = hub, tuple(routes)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        request = Request(scope, receive)
        try:
            response = await self._respond(request)
        except HubError as error:
            response = error.response()
        await response(scope, receive, send)

    async def _respond(self, request: Request) -> Response:
        path = request.scope["raw_path"].decode()
        for candidate in self._routes:
            match = candidate.path.fullmatch(path)
            if match and request.method in candidate.method.split("|"):
                identity = self._identify(request.headers.get("authorization", ""))
                return await candidate.handler(
                    Call(hub=self._hub, request=request, parts=match.groupdict(), identity=identity)
                )
        raise HubError(404, "Not found")

    def _identify(self, header: str) -> Identity | None:
        if not header or header.startswith("Basic "):  # an app's own, not a user's
            return None
        identity = self._hub.accounts.identify(header.removeprefix("Bearer "))
        if identity is None:
            raise HubError(401, "Invalid credentials in Authorization header")
        return identity


class FileAnswer(Response):
    """A file, or the range of it that was asked for, read piece by piece."""

    def __init__(self, path: Path, request: Request, headers: Mapping[str, str]) -> None:
        self.path, self.size = path, path.stat().st_size
        self.first, self.end, status = self._range(request.headers.get("range"))
        self.with_body = request.method != "HEAD"
        self.background = None
        self.status_code = status
        length = {"Content-Length": str(self.end - self.first), "Accept-Ranges": "bytes"}
        if status == 206:
            length["Content-Range"] = f"bytes {self.first}-{self.end - 1}/{self.size}"
        self.init_headers({"Content-Type": "application/octet-stream", **headers, **length})

    def _range(self, header: str | None) -> tuple[int, int, int]:
        match = re.fullmatch(r"bytes=(\d*)-(\d*)", header or "")
        if match is None or match.groups() == ("", ""):
            return 0, self.size, 200
        if not match[1]:
            return max(self.size - int(match[2]), 0), self.size, 206
        first = int(match[1])
        end = min(int(match[2]) + 1, self.size) if match[2] else self.size
        if first >= end:
            raise RangeNotSatisfiableError(self.size)
        return first, end, 206

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the header and the bytes; memory stays at one piece whatever the file's size."""
        await send(
            {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers}
        )
        if not self.with_body or self.first == self.end:
            await send({"type": "http.response.body", "body": b""})
            return
        with self.path.open("rb", buffering=0) as file:
            position = self.first
            while position < self.end:
                piece = os.pread(file.fileno(), min(PIECE_BYTES, self.end - position), position)
                position += len(piece)
                more = position < self.end
                await send({"type": "http.response.body", "body": piece, "more_body": more})


class RangeNotSatisfiableError(HubError):
    """The range lies outside the file."""

    def __init__(self, size: int) -> None:
        super().__init__(416, "Range not satisfiable")
        self.size = size

    def response(self) -> Response:
        """A 416 that says how long the file is."""
        response = super().response()
        response.headers["Content-Range"] = f"bytes */{self.size}"
        return response
