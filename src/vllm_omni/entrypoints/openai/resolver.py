"""Checking prompts off the event loop, and not more of them at once than can be checked soon."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor

from vllm_omni.errors import QueueFullError
from vllm_omni.inputs.data import OmniDiffusionSamplingParams, OmniPrompt
from vllm_omni.omni import AsyncOmni, Job

MAX_WAITING = 64
"""At some tens of milliseconds for the longest prompt, the last of them waits for seconds at most."""


class Resolver:
    """One thread: counting the tokens of a long prompt takes tens of milliseconds; tokenizers take one at a time."""

    def __init__(self, omni: AsyncOmni, max_waiting: int = MAX_WAITING) -> None:
        self._omni = omni
        self._max_waiting = max_waiting
        self._num_waiting = 0
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="omni-resolve")

    async def resolve(self, prompt: OmniPrompt, params: OmniDiffusionSamplingParams) -> Job:
        """As `AsyncOmni.resolve`. Raises QueueFullError where too many wait to be checked."""
        if self._num_waiting >= self._max_waiting:
            raise QueueFullError(f"{self._num_waiting} requests wait for their prompts to be read", retry_after=1.0)
        self._num_waiting += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, self._omni.resolve, prompt, params)
        finally:
            self._num_waiting -= 1

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)
