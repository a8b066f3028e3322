"""What a logout leaves in the browser: nothing of the form, of the last job, or of the account."""

from starlette.types import ASGIApp, Message, Receive, Scope, Send

_LOGOUT = "/logout"


class Leaving:
    """Has the browser clear what this app keeps there, when somebody logs out.

    Args:
        app: what is behind.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Hand every request on; add the header to the answer of the logout."""

        async def clearing(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [
                    *message.get("headers", ()),
                    (b"clear-site-data", b'"storage"'),
                ]
            await send(message)

        leaves = scope["type"] == "http" and scope["path"] == _LOGOUT
        await self._app(scope, receive, clearing if leaves else send)
