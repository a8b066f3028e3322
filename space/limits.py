"""What a request may carry: no file, no more than a recipe needs, what its endpoint takes."""

from starlette.exceptions import HTTPException
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

# A recipe has 32 kB at most; gradio adds the values of the form.
MAX_BODY_BYTES = 256 * 1024
_TOO_LARGE = f"A request may have {MAX_BODY_BYTES} bytes here."
_UPLOAD, _CALL = "/gradio_api/upload", "/gradio_api/call/"


class Limits:
    """Refuses uploads, and bodies that are larger than any that this app is sent.

    Args:
        app: what is behind.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request that is refused; hand on every other, counting its bytes."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if scope["path"].startswith(_UPLOAD):
            await PlainTextResponse("Nothing is uploaded here.", 403)(scope, receive, send)
            return
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        if not declared.isdigit() or int(declared) > MAX_BODY_BYTES:
            # Closed, or the server would go on to read what is refused.
            answer = PlainTextResponse(_TOO_LARGE, 413, {"connection": "close"})
            await answer(scope, receive, send)
            return
        count, started = 0, False

        async def counted() -> Message:
            nonlocal count
            message = await receive()
            count += len(message.get("body", b""))
            if count > MAX_BODY_BYTES:
                raise HTTPException(413, _TOO_LARGE)
            return message

        async def noting(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self._app(scope, counted, noting)
        except TypeError as exc:
            # Of arguments by name that an endpoint does not have, or lacks.
            if started or not scope["path"].startswith(_CALL):
                raise
            await PlainTextResponse(str(exc), 400)(scope, receive, send)
