"""Log lines about requests: one when a request ends, and a summary every few seconds while requests run."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence

from vllm_omni.diffusion.control.events import EngineObserver, EngineStatus
from vllm_omni.diffusion.messages.plan import StepPlan, StepResult
from vllm_omni.diffusion.messages.request import DiffusionRequest

logger = logging.getLogger(__name__)

STATUS_SECONDS = 10.0


class ActivityLog(EngineObserver):
    """An EngineObserver that logs. Its timer runs only while there are requests. It never logs prompts."""

    def __init__(self, status_seconds: float = STATUS_SECONDS) -> None:
        """`status_seconds`: time between two summaries."""
        self._status_seconds = status_seconds
        self._status: Callable[[], EngineStatus] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._since = 0.0
        self._num_steps = 0
        """Denoising steps of all requests since the last summary."""

    def watch(self, status: Callable[[], EngineStatus]) -> None:
        """Set the source of the numbers of requests. Must be called before the first request."""
        self._status = status

    def on_add(self, requests: Sequence[DiffusionRequest]) -> None:
        if self._timer is None:
            self._start_timer()

    def on_step(self, plan: StepPlan, result: StepResult, seconds: float) -> None:
        self._num_steps += sum(map(result.num_made, result.advanced))

    def on_finish(self, request: DiffusionRequest, timings: dict[str, float], outcome: str, reason: str) -> None:
        size = f"{request.width}x{request.height}"
        logger.info(
            "Request %s %s%s: %s, %g of %d steps computed, %g cached; %.2f s queued, %.2f s running, %.2f s in all",
            request.request_id,
            outcome,
            f" ({reason})" if reason else "",
            size if request.num_frames == 1 else f"{size}, {request.num_frames} frames",
            round(timings["computed_steps"], 2),
            request.num_inference_steps,
            round(timings["cached_steps"], 2),
            timings["queue"],
            timings["total"] - timings["queue"],
            timings["total"],
        )

    def _start_timer(self) -> None:
        self._since, self._num_steps = time.monotonic(), 0
        self._timer = asyncio.get_running_loop().call_later(self._status_seconds, self._tell)

    def _tell(self) -> None:
        assert self._status is not None, "`watch` comes before the first request"
        status = self._status()
        if status.num_running + status.num_waiting == 0:
            self._timer = None
            return
        logger.info(
            "Running: %d, waiting: %d, %.2f steps/s, %.1f s of work left",
            status.num_running,
            status.num_waiting,
            self._num_steps / (time.monotonic() - self._since),
            status.queue_seconds,
        )
        self._start_timer()
