"""Files of a finished job, sent to a browser from where they lie: nothing is copied for it."""

import hashlib
import hmac
import json
import secrets
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from starlette.requests import Request
from starlette.responses import FileResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from ..explore import OWN_BYTES, pinned_recipe, report_in
from .jobs import Jobs
from .records import DONE, Job

_ARCHIVE = "merged.zip"
_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Download:
    """One file that may be downloaded.

    Attributes:
        name: below the output's folder.
        nbytes: its size; None for the archive, which is made while it is sent.
        path: on the server, with a signature: who has it may download the file.
    """

    name: str
    nbytes: int | None
    path: str


class Downloads:
    """The files of finished jobs. Every method may be called from any thread.

    Args:
        jobs: whose results they are.
    """

    def __init__(self, jobs: Jobs) -> None:
        self._jobs = jobs
        # Of this start: a page that is opened again gets new addresses.
        self._secret = secrets.token_bytes(32)

    def of(self, job: Job) -> list[Download]:
        """Return what may be downloaded of a job, for a visitor who may see it; none if not done.

        The output's files and all of them as one archive; of a merge that was published, what its
        report says.
        """
        if job.state != DONE:
            return []
        files = self._files(job)
        archive = [Download(_ARCHIVE, None, self._path(job, _ARCHIVE))] if files else []
        beside = [] if files else list(self._made(job).items())
        return [
            *archive,
            *(
                Download(name, path.stat().st_size, self._path(job, name))
                for name, path in files.items()
            ),
            *(Download(name, len(data), self._path(job, name)) for name, data in beside),
        ]

    def route(self) -> Route:
        """Return ``GET /files/{job}/{name}?key=…``, for addresses that `of` gives."""
        return Route("/files/{job}/{name:path}", self._answer)

    def _answer(self, request: Request) -> Response:
        name = request.path_params["name"]
        job = self._jobs.get(request.path_params["job"])
        key = request.query_params.get("key", "").encode(errors="replace")
        if job is None or not hmac.compare_digest(key, self._key(job, name).encode()):
            return PlainTextResponse("Open the page of the job again for its files.", 404)
        files = self._files(job)
        shown = f"attachment; filename*=utf-8''{quote(Path(name).name)}"
        headers = {"Content-Disposition": shown, "X-Content-Type-Options": "nosniff"}
        if name in files:
            media_type = "application/octet-stream"
            return FileResponse(files[name], media_type=media_type, headers=headers)
        if name == _ARCHIVE and files:
            return StreamingResponse(_zipped(files), headers=headers, media_type="application/zip")
        made = self._made(job) if not files else {}
        if name in made:
            return Response(made[name], headers=headers, media_type="application/octet-stream")
        return PlainTextResponse("These files are gone: they stay for a day.", 404)

    def _files(self, job: Job) -> dict[str, Path]:
        folder = self._jobs.result(job)
        paths = sorted(path for path in folder.rglob("*") if path.is_file())
        return {path.relative_to(folder).as_posix(): path for path in paths}

    def _made(self, job: Job) -> dict[str, bytes]:
        data = self._jobs.report(job)
        if data is None:
            return {}
        report = report_in(data, name="This merge", max_bytes=OWN_BYTES)
        return {"report.json": data, "recipe.yml": pinned_recipe(report).encode()}

    def _path(self, job: Job, name: str) -> str:
        return f"/files/{job.id}/{quote(name)}?key={self._key(job, name)}"

    def _key(self, job: Job, name: str) -> str:
        message = json.dumps([job.id, name]).encode()
        return hmac.new(self._secret, message, hashlib.sha256).hexdigest()


class _Sent:
    """What a zip archive is written to: it only keeps what was not sent yet."""

    def __init__(self) -> None:
        self.waiting = bytearray()

    def write(self, data: bytes) -> int:
        self.waiting += data
        return len(data)

    def flush(self) -> None:
        pass


def _zipped(files: Mapping[str, Path]) -> Iterator[bytes]:
    """Yield an archive of some files, a piece at a time; nothing of it is on the disk."""
    sent = _Sent()
    with zipfile.ZipFile(sent, "w", zipfile.ZIP_STORED) as archive:  # type: ignore[call-overload]
        for name, path in files.items():
            entry = zipfile.ZipInfo.from_file(path, name)
            with path.open("rb") as file, archive.open(entry, "w", force_zip64=True) as written:
                while piece := file.read(_CHUNK_BYTES):
                    written.write(piece)
                    yield bytes(sent.waiting)
                    sent.waiting.clear()
    yield bytes(sent.waiting)
