"""News of a running job for the pages that watch it: a plain request, for hundreds ask often."""

import threading
import time
import zlib
from typing import Any

import anyio
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from ..jobs.records import Job
from ..service import Service
from ..view import jobs as view
from ..view.figures import live_html

# How often the running picture is drawn, for all who watch.
_PICTURE_S = 4.0


class News:
    """What changes on a page while a job runs. Every method may be called from any thread.

    Args:
        service: whose jobs they are.
    """

    def __init__(self, service: Service) -> None:
        self._service = service
        self._pictures: dict[str, tuple[float, int, str]] = {}
        self._lock = threading.Lock()

    def route(self) -> Route:
        """Return ``GET /news/{job}?log=…&picture=…``, as `since`; 404 where the job is another's.

        Beside gradio's events, not one of them: those take five times the instructions
        (docs/performance.md, a Space that is watched).
        """
        return Route("/news/{job}", self._answer)

    def since(self, job: Job, log: str = "", picture: str = "") -> dict[str, str]:
        """Return a job's state and progress, and log and picture where a page shows others.

        Args:
            job: which.
            log: stamp of the log that is shown.
            picture: stamp of the picture that is shown.

        Returns:
            ``state``, ``status`` (HTML), ``log_stamp`` and ``gates_stamp``; ``log`` and ``gates``
            (HTML) unless the stamps are those.
        """
        said = "\n".join(job.log)
        count, drawn = self.picture(job)
        news = {
            "state": job.state,
            "status": self.status(job),
            "log_stamp": f"{zlib.crc32(said.encode()):x}",
            "gates_stamp": str(count),
        }
        if news["log_stamp"] != log:
            news["log"] = said
        if news["gates_stamp"] != picture:
            news["gates"] = drawn
        return news

    def status(self, job: Job) -> str:
        """Return how far a job is, as HTML."""
        return view.status_html(job, place=self._service.jobs.place(job))

    def picture(self, job: Job) -> tuple[int, str]:
        """Return how many tensors the running picture shows, and the picture as HTML."""
        rows = self._service.jobs.live(job).rows
        now, count = time.monotonic(), len(rows)
        with self._lock:
            drawn = self._pictures.get(job.id)
            if drawn is not None and (drawn[1] == count or now - drawn[0] < _PICTURE_S):
                return drawn[1], drawn[2]
            picture = live_html(rows[:count])
            self._pictures[job.id] = (now, count, picture)
            for old in list(self._pictures)[:-50]:
                del self._pictures[old]
            return count, picture

    async def _answer(self, request: Request) -> Response:
        job = self._service.jobs.get(request.path_params["job"])
        # Only an account's job is worth asking the Hub who looks.
        if job is None or not job.may_see(await self._who(request) if job.owner else ""):
            return JSONResponse({}, status_code=404)
        asked = request.query_params
        news = self.since(job, asked.get("log", ""), asked.get("picture", ""))
        return JSONResponse(news, headers={"Cache-Control": "no-store"})

    async def _who(self, request: Request) -> str:
        # What gradio's sign-in keeps of somebody; it is there where the page has its button.
        session: dict[str, Any] = request.scope.get("session") or {}
        info = session.get("oauth_info") or {}
        token = info.get("access_token") if info.get("expires_at", 0) > time.time() else None
        # It may have to ask the Hub.
        visitor = await anyio.to_thread.run_sync(self._service.visitors.who_or_nobody, token)
        return visitor.name
