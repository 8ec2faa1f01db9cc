"""Time that the HTTP app adds to the engine, for each picture."""

from __future__ import annotations

import asyncio
import base64
import io
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import uvicorn
from PIL import Image

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.report import Row
from vllm_omni import Omni
from vllm_omni.entrypoints.openai.app import build_app
from vllm_omni.entrypoints.openai.settings import ServerSettings

MODEL_NAME = "bench"
STEPS = 2
NUM_PICTURES = 8
CLOSE_SECONDS, POLL_SECONDS = 10.0, 0.01


def over_http(bench: Bench, omni: Omni, name: str) -> list[Row]:
    """Time the same pictures from the engine and as PNG in `b64_json`, in turn, one at a time."""
    size, prompt = bench.size(1024), bench.prompt(name)
    body = {
        "prompt": prompt.prompt,
        "size": f"{size[1]}x{size[0]}",
        "num_inference_steps": STEPS,
        "response_format": "b64_json",
    }
    direct, served, encoded = [], [], []
    with _server(omni) as url, httpx.Client(base_url=url, timeout=60) as client:
        for seed in range(NUM_PICTURES + 1):
            start = time.perf_counter()
            omni.generate(prompt, bench.params(name, size, STEPS, seed=seed))
            between = time.perf_counter()
            response = client.post("/v1/images/generations", json={**body, "seed": seed})
            end = time.perf_counter()
            response.raise_for_status()
            if seed:  # the first picture is a warm-up
                direct.append(between - start)
                served.append(end - between)
                encoded.append(response.json()["timings"]["media_encode"])
    _check(response.json(), (size[0], size[1]))
    over, encoding = (1e3 * (statistics.median(x) - y) for x, y in ((served, statistics.median(direct)), (encoded, 0)))
    detail: dict[str, Any] = {
        "pictures": NUM_PICTURES,
        "PNG and base64 ms": encoding,
        "rest ms": over - encoding,
        "over HTTP ms": 1e3 * statistics.median(served),
        "engine ms": 1e3 * statistics.median(direct),
        "MB": len(response.content) / 1e6,
    }
    return [Row(f"{name}, HTTP over the engine, a picture", over, "ms", detail=detail)]


@contextmanager
def _server(omni: Omni) -> Iterator[str]:
    """Serve the app on the engine's loop, as `vllm serve --omni` does; yields its address."""

    async def make() -> uvicorn.Server:
        app = build_app(omni._async, ServerSettings(served_model_names=(MODEL_NAME,)))
        return uvicorn.Server(uvicorn.Config(app, "127.0.0.1", 0, log_level="warning", ws="none"))

    server = asyncio.run_coroutine_threadsafe(make(), omni._loop).result(CLOSE_SECONDS)
    serving = asyncio.run_coroutine_threadsafe(server.serve(), omni._loop)
    try:
        while not server.started:
            if serving.done():
                serving.result()
                raise RuntimeError("the server ended before it had started")
            time.sleep(POLL_SECONDS)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        serving.result(CLOSE_SECONDS)


def _check(answer: dict[str, Any], size: tuple[int, int]) -> None:
    """Raise ValueError unless the response is a picture of that size."""
    picture = Image.open(io.BytesIO(base64.b64decode(answer["data"][0]["b64_json"])))
    if picture.size != (size[1], size[0]):
        raise ValueError(f"the server sent a picture of {picture.size}")
