"""The number of prompts that wait for their check is limited like the queue; further ones are refused."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import httpx
import pytest

from testbed.fakes import make_config
from testbed.live_server import MODEL_NAME, live_server
from testbed.patience import GUARD_SECONDS
from vllm_omni.diffusion.control.events import EngineObserver
from vllm_omni.diffusion.control.request_builder import CheckedPrompt
from vllm_omni.entrypoints.openai.requests.prompt_checker import PromptChecker
from vllm_omni.errors import QueueFullError
from vllm_omni.inputs.data import OmniDiffusionSamplingParams, OmniPrompt


class SlowOmni:
    """Resolves prompts once `go` is set."""

    def __init__(self, max_num_queued_reqs: int) -> None:
        self.config = make_config(max_num_queued_reqs=max_num_queued_reqs)
        self.go = threading.Event()

    def make_checked_job(self, checked: CheckedPrompt) -> str:
        self.go.wait(GUARD_SECONDS)
        return checked.prompt.prompt


def checked(text: str) -> CheckedPrompt:
    params = OmniDiffusionSamplingParams()
    return CheckedPrompt(OmniPrompt(text), params, params, {})


class NotedRejects(EngineObserver):
    def __init__(self) -> None:
        self.rejects: list[str] = []

    def on_reject(self, reason: str) -> None:
        self.rejects.append(reason)


async def test_those_beyond_the_bound_are_told_to_come_back() -> None:
    omni: Any = SlowOmni(max_num_queued_reqs=2)
    observer = NotedRejects()
    checker: Any = PromptChecker(omni, observer)
    checker._seconds = 3e6
    waiting = [asyncio.create_task(checker.make_job(checked(text))) for text in "ab"]
    await asyncio.sleep(0)
    with pytest.raises(QueueFullError, match="2 requests wait") as caught:
        await checker.make_job(checked("c"))
    assert caught.value.retry_after == 6e6, "until those that wait are read"
    assert observer.rejects == ["queue_full"]
    omni.go.set()
    assert await asyncio.gather(*waiting) == ["a", "b"]
    assert await checker.make_job(checked("d")) == "d"  # there is room again
    assert 0 < checker._seconds < 3e6, "measured"
    checker.close()


async def test_a_burst_that_the_queue_takes_is_taken() -> None:
    """A burst as large as the queue is accepted."""
    with live_server(max_num_queued_reqs=100) as running:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=running.url, limits=limits) as client:
            body = {"prompt": "x", "model": MODEL_NAME, "size": "16x16", "num_inference_steps": 1}
            answers = await asyncio.gather(*(client.post("/v1/images/generations", json=body) for _ in range(100)))
    assert {answer.status_code for answer in answers} == {200}
