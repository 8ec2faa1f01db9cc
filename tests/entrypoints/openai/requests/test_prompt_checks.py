"""Prompts that wait to be read are bounded as the queue is: a crowd of long ones is refused, not queued without end."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import httpx
import pytest

from tests.entrypoints.openai.live_server import MODEL_NAME, live_server
from tests.fakes import make_config
from tests.patience import GUARD_SECONDS
from vllm_omni.diffusion.control.events import NullObserver
from vllm_omni.entrypoints.openai.requests.prompt_checks import Resolver
from vllm_omni.errors import QueueFullError
from vllm_omni.inputs.data import OmniDiffusionSamplingParams, OmniPrompt


class SlowOmni:
    """Reads prompts when it is told to."""

    def __init__(self, max_num_queued_reqs: int) -> None:
        self.config = make_config(max_num_queued_reqs=max_num_queued_reqs)
        self.go = threading.Event()

    def resolve(self, prompt: OmniPrompt, params: OmniDiffusionSamplingParams) -> str:
        self.go.wait(GUARD_SECONDS)
        return prompt.prompt


class NotedRejects(NullObserver):
    def __init__(self) -> None:
        self.rejects: list[str] = []

    def on_reject(self, reason: str) -> None:
        self.rejects.append(reason)


async def test_those_beyond_the_bound_are_told_to_come_back() -> None:
    omni: Any = SlowOmni(max_num_queued_reqs=2)
    observer = NotedRejects()
    resolver: Any = Resolver(omni, observer)  # whose jobs are the prompts here
    params = OmniDiffusionSamplingParams()
    resolver._seconds = 3e6
    waiting = [asyncio.create_task(resolver.resolve(OmniPrompt(text), params)) for text in "ab"]
    await asyncio.sleep(0)
    with pytest.raises(QueueFullError, match="2 requests wait") as caught:
        await resolver.resolve(OmniPrompt("c"), params)
    assert caught.value.retry_after == 6e6, "until those that wait are read"
    assert observer.rejects == ["queue_full"]
    omni.go.set()
    assert await asyncio.gather(*waiting) == ["a", "b"]
    assert await resolver.resolve(OmniPrompt("d"), params) == "d"  # there is room again
    assert 0 < resolver._seconds < 3e6, "measured"
    resolver.close()


async def test_a_burst_that_the_queue_takes_is_taken() -> None:
    """The queue has exactly as many places as there are clients."""
    with live_server(max_num_queued_reqs=100) as running:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=running.url, limits=limits) as client:
            body = {"prompt": "x", "model": MODEL_NAME, "size": "16x16", "num_inference_steps": 1}
            answers = await asyncio.gather(*(client.post("/v1/images/generations", json=body) for _ in range(100)))
    assert {answer.status_code for answer in answers} == {200}
