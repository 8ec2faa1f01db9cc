"""Number of requests under way, which `/load` shows."""

from __future__ import annotations

from starlette.types import ASGIApp, Receive, Scope, Send


class ServerLoad:
    """Number of requests whose response is not complete yet."""

    def __init__(self) -> None:
        self.num_requests = 0


class CountLoad:
    """Middleware: counts requests in `load`, from their first byte until their response is sent.

    paths: only requests whose path ends with one of these are counted.
    """

    def __init__(self, app: ASGIApp, load: ServerLoad, paths: tuple[str, ...]) -> None:
        self._app = app
        self._load = load
        self._paths = paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not scope["path"].endswith(self._paths):
            return await self._app(scope, receive, send)
        self._load.num_requests += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self._load.num_requests -= 1
