"""Routes that this server, or its model, does not have: an error that names the alternative."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.exceptions import HTTPException
from starlette.responses import Response

from vllm_omni.errors import InvalidRequestError

ADAPTERS = (
    "Adapters are given at start, by --lora-modules NAME=PATH, and stay; GET /v1/loras lists them. None is loaded or "
    "unloaded while the server runs."
)


def make_unavailable_router() -> APIRouter:
    router = APIRouter(include_in_schema=False)

    @router.post("/v1/load_lora_adapter")
    @router.post("/v1/unload_lora_adapter")
    async def adapters() -> Response:
        raise HTTPException(501, ADAPTERS)

    return router


def make_no_videos_router() -> APIRouter:
    """The routes under `/v1/videos`, for a model that makes pictures."""
    router = APIRouter(include_in_schema=False)

    @router.api_route("/v1/videos", methods=["GET", "POST"])
    @router.api_route("/v1/videos/{rest:path}", methods=["GET", "HEAD", "POST", "DELETE"])
    async def videos() -> Response:
        raise InvalidRequestError(
            "The served model makes pictures and no videos: use POST /v1/images/generations or /v1/images/edits.",
            param="model",
        )

    return router
