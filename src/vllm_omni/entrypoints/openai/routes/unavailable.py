"""Routes of vllm-omni and vLLM that this server does not have yet: a 501 that names the alternative."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.exceptions import HTTPException
from starlette.responses import Response

VIDEOS = "Videos are not served over HTTP yet; vllm_omni.Omni makes them offline, with models that make videos."
ADAPTERS = (
    "Adapters are given at start, by --lora-modules NAME=PATH, and stay; GET /v1/loras lists them. None is loaded or "
    "unloaded while the server runs."
)


def make_unavailable_router() -> APIRouter:
    router = APIRouter(include_in_schema=False)

    @router.api_route("/v1/videos", methods=["GET", "POST"])
    @router.api_route("/v1/videos/{rest:path}", methods=["GET", "POST", "DELETE"])
    async def videos() -> Response:
        raise HTTPException(501, VIDEOS)

    @router.post("/v1/load_lora_adapter")
    @router.post("/v1/unload_lora_adapter")
    async def adapters() -> Response:
        raise HTTPException(501, ADAPTERS)

    return router
