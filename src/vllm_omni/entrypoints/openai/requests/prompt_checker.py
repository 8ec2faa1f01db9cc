"""Checks of prompts off the event loop, bounded in number."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from vllm_omni.diffusion.control.events import EngineObserver, reporting_rejects
from vllm_omni.diffusion.control.request_builder import CheckedPrompt
from vllm_omni.entrypoints.openai.requests.pictures.pool import DecodePool
from vllm_omni.errors import QueueFullError
from vllm_omni.inputs.data import OmniDiffusionSamplingParams, OmniPrompt
from vllm_omni.jobs import Job
from vllm_omni.omni import AsyncOmni

Result = TypeVar("Result")

_MEMORY = 0.9
"""Weight of the past in the moving average of a check's duration."""


class PromptChecker:
    """Checks prompts and counts their tokens in one thread: a long prompt takes tens of milliseconds, and a tokenizer
    is used by one thread at a time."""

    def __init__(self, omni: AsyncOmni, observer: EngineObserver) -> None:
        self._omni = omni
        self._observer = observer
        self._max_waiting = omni.config.max_num_queued_reqs
        self._num_waiting = 0
        self._seconds = 0.0
        """Average duration of a check."""
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="omni-check-prompt")

    async def check(
        self, prompt: OmniPrompt, params: OmniDiffusionSamplingParams, decoder: DecodePool
    ) -> CheckedPrompt:
        """Run `AsyncOmni.check`, in a thread of `decoder` if there are pictures: resizing takes up to a second.

        Raises QueueFullError as `make_job`.
        """
        with reporting_rejects(self._observer):
            if prompt.images:
                return await decoder.run(lambda: self._omni.check(prompt, params))
            return await self._run(lambda: self._omni.check(prompt, params))

    async def make_job(self, checked: CheckedPrompt) -> Job:
        """Run `AsyncOmni.make_checked_job` in the thread.

        Raises QueueFullError if as many prompts wait for the thread as the engine's queue takes requests.
        """
        with reporting_rejects(self._observer):
            return await self._run(lambda: self._omni.make_checked_job(checked))

    async def _run(self, check: Callable[[], Result]) -> Result:
        if (number := self._num_waiting) >= self._max_waiting:
            raise QueueFullError(
                f"{number} requests wait for their prompts to be read", retry_after=number * self._seconds
            )
        self._num_waiting += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, self._timed, check)
        finally:
            self._num_waiting -= 1

    def _timed(self, check: Callable[[], Result]) -> Result:
        start = time.monotonic()
        try:
            return check()
        finally:
            self._seconds = _MEMORY * self._seconds + (1 - _MEMORY) * (time.monotonic() - start)

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)
