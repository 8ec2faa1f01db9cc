"""The HTTP app: routes, errors and middlewares around an engine that the caller starts and stops."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from fastapi import APIRouter, FastAPI

from vllm_omni import __version__
from vllm_omni.entrypoints.openai.errors import install_error_handlers
from vllm_omni.entrypoints.openai.metrics import PrometheusObserver
from vllm_omni.entrypoints.openai.middlewares import (
    CatchErrors,
    CountLoad,
    IgnoreTrailingSlash,
    RequestId,
    SendInPieces,
    ServerLoad,
)
from vllm_omni.entrypoints.openai.requests.body_reader import BodyReader, UploadBudget
from vllm_omni.entrypoints.openai.requests.fetching import FetchPolicy, MediaFetcher
from vllm_omni.entrypoints.openai.requests.input_pictures import MAX_IMAGE_BYTES, PictureReader
from vllm_omni.entrypoints.openai.requests.picture_body import PictureBodyReader
from vllm_omni.entrypoints.openai.requests.pictures.pool import DecodePool
from vllm_omni.entrypoints.openai.requests.pictures.process import DecodeLimits
from vllm_omni.entrypoints.openai.requests.prompt_checker import PromptChecker
from vllm_omni.entrypoints.openai.responses.encoding import ImageEncoder
from vllm_omni.entrypoints.openai.responses.stored_files import FileStore
from vllm_omni.entrypoints.openai.routes.adapters import AdapterService, make_adapters_router
from vllm_omni.entrypoints.openai.routes.chat import CHAT_PATH, ChatService, make_chat_router
from vllm_omni.entrypoints.openai.routes.health import make_health_router, make_models_router
from vllm_omni.entrypoints.openai.routes.images import EDITS_PATH, GENERATIONS_PATH, ImageService, make_images_router
from vllm_omni.entrypoints.openai.routes.picture_service import PictureService
from vllm_omni.entrypoints.openai.routes.sleep import make_sleep_router
from vllm_omni.entrypoints.openai.routes.swagger import OPENAPI_PATH, make_docs_router, require_api_key
from vllm_omni.entrypoints.openai.routes.unavailable import make_no_videos_router
from vllm_omni.entrypoints.openai.settings import ServerSettings
from vllm_omni.omni import AsyncOmni

if TYPE_CHECKING:  # a server for pictures needs neither databases nor encoders of videos
    from vllm_omni.entrypoints.openai.routes.video_chat import VideoChat
    from vllm_omni.video_jobs.service import VideoJobs

WORK_PATHS = (GENERATIONS_PATH, EDITS_PATH, CHAT_PATH, "/v1/videos", "/v1/videos/sync", "/remix")
"""Ends of the paths of POST requests that make something."""


def build_app(
    omni: AsyncOmni,
    settings: ServerSettings,
    metrics: PrometheusObserver | None = None,
    fetch_policy: FetchPolicy = FetchPolicy(),  # noqa: B008 (frozen)
    decode_limits: DecodeLimits = DecodeLimits(),  # noqa: B008 (frozen)
    jobs: VideoJobs | None = None,
) -> FastAPI:
    """The app that serves `omni`. `metrics`: the observer given to `omni`; None leaves the engine's metrics empty.

    `jobs`: video jobs of a model that makes videos. The lifespan of the app starts and closes them, and owns the
    threads and the decode processes. The app is for uvicorn with `HttpProtocol`, which disconnects slow readers.
    """
    metrics = metrics or PrometheusObserver(settings.served_model_names[0])
    metrics.watch(omni.status)
    metrics.watch_adapters(omni.adapter_stats)
    files = FileStore(settings.media_ttl_seconds, settings.max_media_bytes)
    encoder = ImageEncoder(settings.num_encoding_threads, settings.num_band_threads, metrics.on_encoded)
    checker = PromptChecker(omni, metrics)
    decoder = DecodePool(settings.num_encoding_threads, decode_limits)
    media = MediaFetcher(settings.allowed_media_domains, MAX_IMAGE_BYTES, fetch_policy)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        if omni.info.image_input is not None:
            decoder.start()
        sweeping = asyncio.create_task(files.sweep_forever())
        if jobs is not None:
            await jobs.start()
        try:
            yield
        finally:
            sweeping.cancel()
            if jobs is not None:
                await jobs.close()
            checker.close()
            encoder.close()
            decoder.close()
            await media.close()

    app = FastAPI(
        title="vllm-omni",
        version=__version__,
        root_path=settings.root_path,
        lifespan=lifespan,
        redirect_slashes=False,
        openapi_url=None if settings.disable_docs else OPENAPI_PATH,
        docs_url=None,  # FastAPI's own pages load their scripts from the web
        redoc_url=None,
    )
    budget = UploadBudget()
    app.state.upload_budget, app.state.decode_pool = budget, decoder
    bodies, reader = BodyReader(settings.upload_silence_seconds), PictureReader(omni.info, decoder, media)
    uploads = PictureBodyReader(bodies, reader)
    pictures = PictureService(omni, settings, budget, encoder, decoder, checker)
    load = ServerLoad()
    app.include_router(make_images_router(ImageService(pictures, bodies, uploads, files)))
    chat = ChatService(pictures, bodies, reader, metrics, _video_chat(pictures, jobs))
    app.include_router(make_chat_router(chat))
    app.include_router(make_models_router(omni, settings))
    adapters = make_adapters_router(AdapterService(pictures, bodies))
    for router in (make_health_router(omni, load, metrics), make_sleep_router(omni), adapters):
        app.include_router(router)
    app.include_router(_videos_router(pictures, bodies, uploads, jobs))
    if not settings.disable_docs:
        app.include_router(make_docs_router(app.title, settings.swagger_ui_folder))
        if settings.requires_api_key:
            require_api_key(app)
    install_error_handlers(app, metrics)
    # The last one added is the outermost.
    app.add_middleware(CatchErrors)
    app.add_middleware(CountLoad, load=load, paths=WORK_PATHS)
    app.add_middleware(IgnoreTrailingSlash)
    app.add_middleware(RequestId)
    app.add_middleware(SendInPieces)
    return app


def _videos_router(
    pictures: PictureService, bodies: BodyReader, uploads: PictureBodyReader, jobs: VideoJobs | None
) -> APIRouter:
    if jobs is None:
        return make_no_videos_router()
    # Here, because these import databases and encoders of videos.
    from vllm_omni.entrypoints.openai.responses.videos import EventEncoder
    from vllm_omni.entrypoints.openai.routes.video_service import VideoService
    from vllm_omni.entrypoints.openai.routes.videos import make_videos_router

    return make_videos_router(VideoService(pictures, bodies, uploads, jobs, EventEncoder(pictures.encoder)))


def _video_chat(pictures: PictureService, jobs: VideoJobs | None) -> VideoChat | None:
    if jobs is None:
        return None
    from vllm_omni.entrypoints.openai.routes.video_chat import VideoChat

    return VideoChat(pictures, jobs)
