"""Middlewares that look at a request's path and nothing else."""

from __future__ import annotations

from starlette.types import ASGIApp, Receive, Scope, Send


class IgnoreTrailingSlash:
    """Serves `/path/` as `/path`. A redirect would lose the body of a POST."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            scope = {**scope, "path": scope["path"].rstrip("/") or "/"}
        await self._app(scope, receive, send)


class ServerLoad:
    """Number of requests that are not yet answered to their end."""

    def __init__(self) -> None:
        self.num_requests = 0


class CountLoad:
    """Counts requests in `load`, from their first byte until their answer is sent.

    paths: the ends of the paths that are counted.
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
