"""Prompts that wait to be read are bounded: a crowd of long ones is refused, not queued without end."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest

from vllm_omni.entrypoints.openai.resolver import Resolver
from vllm_omni.errors import QueueFullError
from vllm_omni.inputs.data import OmniDiffusionSamplingParams, OmniPrompt


class SlowOmni:
    """Reads prompts when it is told to."""

    def __init__(self) -> None:
        self.go = threading.Event()

    def resolve(self, prompt: OmniPrompt, params: OmniDiffusionSamplingParams) -> str:
        assert self.go.wait(20)
        return prompt.prompt


async def test_those_beyond_the_bound_are_told_to_come_back() -> None:
    omni: Any = SlowOmni()
    resolver = Resolver(omni, max_waiting=2)
    params = OmniDiffusionSamplingParams()
    waiting = [asyncio.create_task(resolver.resolve(OmniPrompt(text), params)) for text in "ab"]
    await asyncio.sleep(0)
    with pytest.raises(QueueFullError, match="2 requests wait") as caught:
        await resolver.resolve(OmniPrompt("c"), params)
    assert caught.value.retry_after == 1.0
    omni.go.set()
    assert await asyncio.wait_for(asyncio.gather(*waiting), 20) == ["a", "b"]
    assert await resolver.resolve(OmniPrompt("d"), params) == "d"  # there is room again
    resolver.close()
