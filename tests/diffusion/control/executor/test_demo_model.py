"""The embedded model through the whole engine, in this process and in a worker process."""

from __future__ import annotations

import asyncio
import dataclasses
import time

import numpy as np
import pytest
import torch

from testbed.fakes import make_config, make_scheduled
from vllm_omni.diffusion.catalog.registry import load_model_info
from vllm_omni.diffusion.control.engine import DiffusionEngine
from vllm_omni.diffusion.control.events import Finished
from vllm_omni.diffusion.control.executor import make_executor

REQUESTS = [
    make_scheduled("a", 64, 3, prompt="red apple", seed=1),
    make_scheduled("b", (64, 96), 2, prompt="a panda on a pink background", seed=2, negative_prompt=None),
]


async def pictures(backend: str) -> dict[str, np.ndarray]:
    config = make_config(distributed_executor_backend=backend)
    engine = DiffusionEngine(config, make_executor(config, load_model_info(config.model)))
    async with asyncio.timeout(200):
        await engine.start()
        try:
            events = engine.add([dataclasses.replace(request, arrival=time.monotonic()) for request in REQUESTS])
            found: dict[str, np.ndarray] = {}
            while len(found) < len(REQUESTS):
                event = await events.get()
                if isinstance(event, Finished):
                    found[event.request_id] = event.image
            return found
        finally:
            await engine.close()


@pytest.mark.thorough
async def test_both_executors_make_the_same_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        inline = await pictures("uni")
    finally:
        torch.set_num_threads(num_threads)
    remote = await pictures("mp")
    for request in REQUESTS:
        image = inline[request.request_id]
        assert image.shape == (request.request.height, request.request.width, 3)
        assert image.dtype == np.uint8
        assert image.std() > 5  # a picture, not a plain surface
        assert np.array_equal(image, remote[request.request_id])
