"""Routes that put the server to sleep and wake it: vLLM's names, parameters and answers."""

from __future__ import annotations

from fastapi import APIRouter, Depends, Request
from starlette.exceptions import HTTPException

from vllm_omni.entrypoints.openai.errors import ERROR_RESPONSES
from vllm_omni.entrypoints.openai.quotes import quote
from vllm_omni.entrypoints.openai.schema.images import IsSleepingResponse, SleepResponse, WakeUpResponse
from vllm_omni.errors import InvalidRequestError
from vllm_omni.omni import AsyncOmni

NOT_ENABLED = "The server sleeps and wakes over HTTP only if it was started with --enable-sleep-mode."
SLEEP_PATH, WAKE_UP_PATH, IS_SLEEPING_PATH = "/sleep", "/wake_up", "/is_sleeping"
PROTECTED_PATHS = SLEEP_PATH, WAKE_UP_PATH
"""Paths that need an API key, where the server has any, although they are not under `/v1`."""


def make_sleep_router(omni: AsyncOmni) -> APIRouter:
    """The routes. The schema shows them if they are enabled; otherwise they are a 404 that names the flag."""
    is_enabled = omni.config.enable_sleep_mode

    def require_enabled() -> None:
        if not is_enabled:
            raise HTTPException(404, NOT_ENABLED)

    router = APIRouter(
        tags=["sleep"], responses=ERROR_RESPONSES, dependencies=[Depends(require_enabled)], include_in_schema=is_enabled
    )

    @router.post(SLEEP_PATH, summary="Free the devices until the server is woken")
    async def sleep(request: Request, level: str = "1", mode: str = "keep") -> SleepResponse:
        """Answers when the devices are free. The answer has the level reached: it may be deeper than the one asked for.

        Level 1 moves the weights to host memory; 2 ends the workers. Requests under way are kept: they are replayed
        after waking, and new ones are refused until then.
        """
        _refuse_unknown(request, ("level", "mode"))
        if level not in ("1", "2"):
            raise InvalidRequestError(f"level takes 1 or 2, got {quote(level)}", param="level")
        if mode != "keep":
            raise InvalidRequestError(
                f"mode takes keep (requests under way are replayed after waking), got {quote(mode)}", param="mode"
            )
        return SleepResponse(status="sleeping", level=await omni.sleep(int(level)))

    @router.post(WAKE_UP_PATH, summary="Wake the server")
    async def wake_up(request: Request) -> WakeUpResponse:
        """Answers when the weights are back. A 503 if the devices lack memory: the server sleeps on."""
        if "tags" in request.query_params:
            raise InvalidRequestError("tags: the server wakes up as a whole; leave tags out", param="tags")
        _refuse_unknown(request, ())
        await omni.wake_up()
        return WakeUpResponse(status="awake")

    @router.get(IS_SLEEPING_PATH, summary="Whether the server sleeps")
    async def is_sleeping() -> IsSleepingResponse:
        """True also on the way to sleep and back."""
        return IsSleepingResponse(is_sleeping=await omni.is_sleeping())

    return router


def _refuse_unknown(request: Request, names: tuple[str, ...]) -> None:
    """Raise InvalidRequestError for a parameter of the URL that the route does not have."""
    for name in request.query_params:
        if name not in names:
            taken = f"the route takes {' and '.join(names)}" if names else "the route takes no parameters"
            raise InvalidRequestError(f"{taken}, got {quote(name)}", param=name[:60])
