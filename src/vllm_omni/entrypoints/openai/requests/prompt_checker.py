"""Checking prompts off the event loop, and not more of them at once than the queue would take."""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor

from vllm_omni.diffusion.control.events import EngineObserver, telling_of_rejects
from vllm_omni.errors import QueueFullError
from vllm_omni.inputs.data import OmniDiffusionSamplingParams, OmniPrompt
from vllm_omni.jobs import Job
from vllm_omni.omni import AsyncOmni

_MEMORY = 0.9
"""Weight that past checks keep, check by check, in the measured duration of one."""


class PromptChecker:
    """One thread: counting the tokens of a long prompt takes tens of milliseconds; tokenizers take one at a time."""

    def __init__(self, omni: AsyncOmni, observer: EngineObserver) -> None:
        self._omni = omni
        self._observer = observer
        self._max_waiting = omni.config.max_num_queued_reqs
        self._num_waiting = 0
        self._seconds = 0.0
        """What a check takes."""
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="omni-resolve")

    async def resolve(self, prompt: OmniPrompt, params: OmniDiffusionSamplingParams) -> Job:
        """As `AsyncOmni.resolve`. Raises QueueFullError where as many wait to be checked as the queue takes at all."""
        with telling_of_rejects(self._observer):
            if (number := self._num_waiting) >= self._max_waiting:
                raise QueueFullError(
                    f"{number} requests wait for their prompts to be read", retry_after=number * self._seconds
                )
            self._num_waiting += 1
            try:
                return await asyncio.get_running_loop().run_in_executor(self._thread, self._resolve, prompt, params)
            finally:
                self._num_waiting -= 1

    def _resolve(self, prompt: OmniPrompt, params: OmniDiffusionSamplingParams) -> Job:
        start = time.monotonic()
        try:
            return self._omni.resolve(prompt, params)
        finally:
            self._seconds = _MEMORY * self._seconds + (1 - _MEMORY) * (time.monotonic() - start)

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)
