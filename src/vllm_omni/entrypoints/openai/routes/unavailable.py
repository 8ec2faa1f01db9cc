"""Routes that the served model does not have: an error that names the alternative."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.responses import Response

from vllm_omni.errors import InvalidRequestError


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
