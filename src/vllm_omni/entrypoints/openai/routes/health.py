"""Routes for probes, autoscalers and SDKs: health, models, load, metrics. None of them waits for anything."""

from __future__ import annotations

import time

from fastapi import APIRouter
from starlette.responses import PlainTextResponse, Response

from vllm_omni import __version__
from vllm_omni.entrypoints.openai.errors import ERROR_RESPONSES
from vllm_omni.entrypoints.openai.metrics import PrometheusObserver
from vllm_omni.entrypoints.openai.middlewares import ServerLoad
from vllm_omni.entrypoints.openai.requests.served_names import ServedNames
from vllm_omni.entrypoints.openai.schema.images import (
    LoadResponse,
    ModelCard,
    ModelList,
    StatusResponse,
    VersionResponse,
)
from vllm_omni.entrypoints.openai.settings import ServerSettings
from vllm_omni.errors import UnavailableError
from vllm_omni.inputs.adapter_paths import path_in_folders
from vllm_omni.inputs.adapters import ServedAdapter
from vllm_omni.omni import AsyncOmni


def make_health_router(omni: AsyncOmni, load: ServerLoad, metrics: PrometheusObserver) -> APIRouter:
    router = APIRouter(tags=["health"], responses=ERROR_RESPONSES)

    @router.head("/ping", include_in_schema=False)
    @router.post("/ping", include_in_schema=False)
    @router.get("/ping", include_in_schema=False)
    @router.head("/health", include_in_schema=False)
    @router.get("/health", summary="Whether the workers are alive", response_model=StatusResponse)
    async def health() -> StatusResponse:
        """200 while every worker is alive and the engine's loop runs; 503 also while any replica restarts."""
        status = omni.status()
        if not status.healthy:
            raise UnavailableError(f"Not all workers are up; the engine is {status.state}.", retry_after=1.0)
        return StatusResponse(status=status.state)

    @router.head("/ready", include_in_schema=False)
    @router.get("/ready", summary="Whether new requests are accepted and run", response_model=StatusResponse)
    async def ready() -> StatusResponse:
        """200 while new requests are accepted and run; 503 also while accepted requests wait for workers to restart."""
        state = omni.status().state
        if state == "restarting":
            raise UnavailableError("The workers restart: requests are queued and answered after that.", retry_after=1.0)
        if omni.ready is None or state != "running":
            raise UnavailableError(f"The engine takes no requests: it is {state}.", retry_after=1.0)
        return StatusResponse(status=state)

    @router.get("/version", summary="The server's version", response_model=VersionResponse)
    async def version() -> VersionResponse:
        return VersionResponse(version=__version__)

    @router.get("/load", summary="Number of requests under way", response_model=LoadResponse)
    async def show_load() -> LoadResponse:
        """Requests for pictures whose response is not complete yet, as load balancers of vLLM read it."""
        return LoadResponse(server_load=load.num_requests)

    @router.get("/metrics", summary="Metrics for Prometheus", response_class=PlainTextResponse)
    async def show_metrics() -> Response:
        """Metrics of the server in Prometheus's text format."""
        return Response(metrics.render(), media_type=metrics.content_type)

    return router


def make_models_router(omni: AsyncOmni, settings: ServerSettings) -> APIRouter:
    router = APIRouter(prefix="/v1", tags=["models"], responses=ERROR_RESPONSES)
    created = int(time.time())
    names = ServedNames(settings.served_model_names, omni.adapters)

    def card(name: str, adapter: ServedAdapter | None = None) -> ModelCard:
        info = omni.info
        return ModelCard(
            id=name,
            created=created,
            input_modalities=info.input_modalities,
            output_modalities=info.output_modalities,
            served_by=info.served_by,
            root=None if adapter is None else path_in_folders(adapter.file, omni.config.lora_dirs),
            parent=None if adapter is None else names.models[0],
        )

    def require_warm() -> None:
        if omni.ready is None:
            raise UnavailableError("The model is still loading.", retry_after=1.0)

    @router.get("/models", summary="List the served models", response_model=ModelList, response_model_exclude_none=True)
    async def list_models() -> ModelList:
        """Names of the model and of the adapters, once the model is warm."""
        require_warm()
        adapters = [card(adapter.name, adapter) for adapter in names.adapters()]
        return ModelList(data=[*map(card, names.models), *adapters])

    @router.get(
        "/models/{model:path}",
        summary="Describe one served model",
        response_model=ModelCard,
        response_model_exclude_none=True,
    )
    async def retrieve_model(model: str) -> ModelCard:
        require_warm()
        names.check(model)
        return card(model, names.adapter(model))

    return router
