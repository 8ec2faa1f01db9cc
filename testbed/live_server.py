"""A real uvicorn server in a thread, around a real engine whose device is a fake."""

from __future__ import annotations

import asyncio
import ssl
import tempfile
import threading
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import numpy as np
import uvicorn
from fastapi import FastAPI

from testbed.fakes import FakeExecutor, FakeRunner, fake_image, make_request
from testbed.patience import GUARD_SECONDS, wait_for
from vllm_omni.diffusion.catalog.model_info import ModelInfo
from vllm_omni.diffusion.catalog.packed_info import PackedModelInfo, Shares
from vllm_omni.diffusion.data import OmniDiffusionConfig
from vllm_omni.diffusion.messages.plan import ItemError, StepPlan
from vllm_omni.diffusion.messages.request import DiffusionRequest
from vllm_omni.entrypoints.openai.app import build_app
from vllm_omni.entrypoints.openai.metrics import PrometheusObserver
from vllm_omni.entrypoints.openai.requests.fetching import FetchPolicy
from vllm_omni.entrypoints.openai.requests.pictures.process import DecodeLimits
from vllm_omni.entrypoints.openai.settings import ServerSettings
from vllm_omni.entrypoints.server.framing import HttpLimits
from vllm_omni.entrypoints.server.http_protocol import HttpProtocol
from vllm_omni.inputs.images import InputImage, ReaderSizes
from vllm_omni.omni import AsyncOmni
from vllm_omni.video_jobs.settings import VideoJobSettings

if TYPE_CHECKING:
    from vllm_omni.video_jobs.service import VideoJobs

MODEL_NAME = "painter"
ALIAS = "org/painter"
STEPS = 4

# The product's limits of time, which a test that is not about them must not reach.
PATIENT_LIMITS = HttpLimits(
    head_seconds=GUARD_SECONDS,
    first_byte_seconds=GUARD_SECONDS,
    drain_seconds=GUARD_SECONDS,
    linger_seconds=GUARD_SECONDS,
)
PATIENT_DECODE_LIMITS = DecodeLimits(seconds=GUARD_SECONDS, start_seconds=GUARD_SECONDS)
PATIENT_FETCH_POLICY = FetchPolicy(
    connect_seconds=GUARD_SECONDS,
    read_seconds=GUARD_SECONDS,
    total_seconds=GUARD_SECONDS,
    tls=ssl.create_default_context(capath=str(Path(__file__).parent)),  # no authorities, which take 30 ms to read
)
PATIENT_SETTINGS = {"upload_silence_seconds": GUARD_SECONDS, "keep_alive_seconds": GUARD_SECONDS}


class PatientHttpProtocol(HttpProtocol):
    limits = PATIENT_LIMITS
    unread_seconds = GUARD_SECONDS


MakeImage = Callable[[DiffusionRequest, int | None], np.ndarray]


def expected_picture(seed: int, height: int = 64, width: int = 64, step: int | None = None) -> np.ndarray:
    """The picture that the fake device makes from a seed; with `step`, its preview after that step."""
    return fake_image(make_request(size=(height, width), seed=seed), step)


class FakeDevice(FakeExecutor):
    """A fake worker that can be paused; a prompt that holds `fail-at-N` fails at its N-th denoising step."""

    def __init__(self, image: MakeImage = fake_image) -> None:
        super().__init__(lambda: FakeRunner(errors=self._error, image=image))
        self.prompts: dict[str, str] = {}
        """Prompt of every request that reached the device, by request id."""
        self.images: dict[str, tuple[InputImage, ...]] = {}

    def _error(self, request_id: str, phase: str, step: int) -> ItemError | None:
        if phase == "denoise" and f"fail-at-{step}" in self.prompts[request_id]:
            return ItemError("out of memory on the fake device", "out_of_memory")
        return None

    def submit(self, plan: StepPlan) -> None:
        self.prompts |= {request.request_id: request.prompt for request in plan.new_requests}
        self.images |= {request.request_id: request.images for request in plan.new_requests}
        super().submit(plan)

    def pause(self) -> None:
        """Run no further plan. Must be called on the engine's loop, like `run_plans` and `resume`."""
        self.hold = True

    async def run_plans(self, count: int) -> None:
        """While paused, run the next `count` plans when they arrive."""
        for _ in range(count):
            while not self.pending:  # noqa: ASYNC110 (a fake has no event for it)
                await asyncio.sleep(0)
            self.release_results()

    def resume(self) -> None:
        self.hold = False
        self.release_results(len(self.pending))


FAKE_INFO = PackedModelInfo(
    path=Path("/nowhere"),
    family="fake",
    size_multiple=16,
    pixels_per_token=16,
    max_prompt_tokens=512,
    count_prompt_tokens=lambda prompt: len(prompt.split()),
    attention_tokens=1000.0,
    num_heads=4,
    head_dim=16,
    num_blocks=2,
    tensor_shares=Shares({"attention heads": 4}),
    text_encoder_shares=Shares({"attention heads": 1}),
    default_sampling_params={"height": 64, "width": 64, "num_inference_steps": STEPS, "true_cfg_scale": 1.0},
)


@dataclass(frozen=True)
class FakeImageInput:
    """Takes up to three pictures, at their own size and at 48x32; each is one token of the prompt."""

    min_images: int = 1
    max_images: int = 3

    def sizes(self, width: int, height: int) -> ReaderSizes:
        return ReaderSizes((width, height), (48, 32))

    def count_prompt_tokens(self, images: Sequence[InputImage]) -> int:
        return len(images)

    def output_size(self, images: Sequence[InputImage]) -> tuple[int, int]:
        height, width = images[-1].reference.shape[:2]
        return height, width


FAKE_EDIT_INFO = replace(FAKE_INFO, image_input=FakeImageInput())
FAKE_VIDEO_INFO = replace(
    FAKE_INFO,
    frame_multiple=4,
    default_fps=8,
    default_sampling_params={**FAKE_INFO.default_sampling_params, "num_frames": 9},
)
"""Makes videos from text; with an `image_input`, from pictures."""


@dataclass
class LiveServer:
    url: str
    omni: AsyncOmni
    device: FakeDevice
    app: FastAPI
    http: uvicorn.Server
    loop: asyncio.AbstractEventLoop
    jobs: VideoJobs | None
    """Jobs of a model that makes videos."""

    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        """The result of `function(*args)` on the server's loop."""

        async def invoke() -> Any:
            result = function(*args)
            return await result if isinstance(result, Awaitable) else result

        return asyncio.run_coroutine_threadsafe(invoke(), self.loop).result(GUARD_SECONDS)

    def wait_until(self, condition: Callable[[], bool]) -> None:
        """Wait until `condition()` is true on the server's loop."""
        wait_for(lambda: self.call(condition))

    def num_unfinished(self) -> int:
        status = self.omni.status()
        return status.num_running + status.num_waiting


@contextmanager
def video_jobs_for(
    omni: AsyncOmni, settings: VideoJobSettings | None, observer: PrometheusObserver
) -> Iterator[VideoJobs | None]:
    """Video jobs of a model that makes videos; without `settings` in a folder that is removed at the end."""
    if not omni.info.makes_videos:
        yield None
        return
    from vllm_omni.video_jobs.service import VideoJobs

    with tempfile.TemporaryDirectory() as folder:
        yield VideoJobs(
            omni, settings or VideoJobSettings(job_store=f"sqlite:///{folder}/jobs.sqlite"), MODEL_NAME, observer
        )


def quick_omni(config: OmniDiffusionConfig, observer: PrometheusObserver) -> AsyncOmni:
    """An engine of a real model, which starts without measurements where its worker is in this process."""
    from testbed.runner_driver import quick_executor  # imports PyTorch, which the fakes do without

    with patch("vllm_omni.omni.make_executor", quick_executor):
        return AsyncOmni(config, observer=observer)


@contextmanager
def live_server(
    *,
    info: ModelInfo = FAKE_INFO,
    model: Path | None = None,
    start_engine: bool = True,
    wrap: Callable[[FastAPI], None] | None = None,
    settings: dict[str, Any] | None = None,
    videos: VideoJobSettings | None = None,
    fetch_policy: FetchPolicy | None = None,
    decode_limits: DecodeLimits | None = None,
    protocol: type[asyncio.Protocol] = PatientHttpProtocol,
    tls: tuple[Path, Path] | None = None,
    image: MakeImage = fake_image,
    **config: Any,
) -> Iterator[LiveServer]:
    """Serve until the block ends. `settings`: of the server; `config`: of the engine; `wrap` changes the app;
    `model`: a real one, without the fakes; `tls`: files of the key and the certificate; `image`: see `FakeRunner`;
    `videos`: stores of the jobs of a model that makes videos.
    Limits of time that are not given are the suite's. Raises what the server's start raised."""
    started: Future[LiveServer] = Future()

    async def serve() -> None:
        device = FakeDevice(image)
        observer = PrometheusObserver(MODEL_NAME)
        if model is not None:
            omni = quick_omni(OmniDiffusionConfig(model=str(model), **config), observer)
        else:
            with (
                patch("vllm_omni.omni.load_model_info", lambda *_: info),
                patch("vllm_omni.omni.check_model_files"),
                patch("vllm_omni.omni.make_executor", lambda *_: device),
            ):
                omni = AsyncOmni(OmniDiffusionConfig(model="fake", **config), observer=observer)
        if start_engine:
            await omni.start()
        try:
            with video_jobs_for(omni, videos, observer) as jobs:
                await serve_app(omni, device, observer, jobs)
        finally:
            await omni.close()

    async def serve_app(
        omni: AsyncOmni, device: FakeDevice, observer: PrometheusObserver, jobs: VideoJobs | None
    ) -> None:
        app = build_app(
            omni,
            ServerSettings(**{"served_model_names": (MODEL_NAME, ALIAS), **PATIENT_SETTINGS, **(settings or {})}),
            observer,
            fetch_policy or PATIENT_FETCH_POLICY,
            decode_limits or PATIENT_DECODE_LIMITS,
            jobs,
        )
        if wrap is not None:
            wrap(app)
        key, certificate = tls or (None, None)
        server = uvicorn.Server(
            uvicorn.Config(
                app,
                "127.0.0.1",
                0,
                http=protocol,
                ssl_keyfile=key,
                ssl_certfile=certificate,
                log_level="warning",
                ws="none",
                timeout_keep_alive=int(GUARD_SECONDS),
                timeout_graceful_shutdown=5,
            )
        )
        serving = asyncio.ensure_future(server.serve())
        while not server.started and not serving.done():  # noqa: ASYNC110 (uvicorn has no event for it)
            await asyncio.sleep(0.002)
        if serving.done():
            await serving
        port = server.servers[0].sockets[0].getsockname()[1]
        url = f"{'https' if tls else 'http'}://127.0.0.1:{port}"
        started.set_result(LiveServer(url, omni, device, app, server, asyncio.get_running_loop(), jobs))
        await serving

    def run() -> None:
        try:
            asyncio.run(serve())
        except BaseException as error:
            if started.done():
                raise
            started.set_exception(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    running = started.result()
    try:
        yield running
    finally:
        running.http.should_exit = True
        thread.join(GUARD_SECONDS)
        assert not thread.is_alive()
