"""What an engine tells: events to whoever waits for a request, its status, and all that happens to an observer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from vllm_omni.diffusion.plan import StepPlan, StepResult
from vllm_omni.diffusion.request import DiffusionRequest
from vllm_omni.errors import QueueFullError, RequestError, UnavailableError


@dataclass(frozen=True)
class StepDone:
    request_id: str
    step: int
    """Denoising steps done."""


@dataclass(frozen=True)
class Preview:
    request_id: str
    step: int
    image: np.ndarray
    """uint8 [height, width, 3]."""


@dataclass(frozen=True)
class Finished:
    request_id: str
    image: np.ndarray
    """uint8 [height, width, 3], of a video [frames, height, width, 3]."""
    timings: dict[str, float]


@dataclass(frozen=True)
class Failed:
    request_id: str
    error: RequestError


EngineEvent = StepDone | Preview | Finished | Failed


@dataclass(frozen=True)
class EngineStatus:
    state: str
    """starting | running | restarting | draining | stopped | failed"""
    num_running: int
    num_waiting: int
    queue_seconds: float
    healthy: bool
    """All workers live and run what they are sent."""
    attention_backends: tuple[str, ...] = ()
    """Those that replicas run with."""


class EngineObserver(Protocol):
    """Told what happens; metrics hang here."""

    def on_step(self, plan: StepPlan, result: StepResult, seconds: float) -> None: ...

    def on_finish(self, request: DiffusionRequest, timings: dict[str, float], outcome: str) -> None:
        """`outcome`: completed | aborted | failed | refused, by the model itself, as wrong."""

    def on_reject(self, reason: str) -> None:
        """`reason`: queue_full | unavailable, and of servers invalid."""

    def on_worker_restart(self, num_replayed: int) -> None: ...


class NullObserver:
    def on_step(self, plan: StepPlan, result: StepResult, seconds: float) -> None: ...

    def on_finish(self, request: DiffusionRequest, timings: dict[str, float], outcome: str) -> None: ...

    def on_reject(self, reason: str) -> None: ...

    def on_worker_restart(self, num_replayed: int) -> None: ...


@contextmanager
def telling_of_rejects(observer: EngineObserver) -> Iterator[None]:
    """Tell `observer` of a refusal for want of room or of workers; the error goes on."""
    try:
        yield
    except QueueFullError:
        observer.on_reject("queue_full")
        raise
    except UnavailableError:
        observer.on_reject("unavailable")
        raise
