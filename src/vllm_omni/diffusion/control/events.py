"""What an engine tells: events to whoever waits for a request, its status, and all that happens to an observer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from vllm_omni.diffusion.messages.plan import StepPlan, StepResult
from vllm_omni.diffusion.messages.request import DiffusionRequest
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
    failure: str = ""
    """Why the engine is `failed`."""


class EngineObserver(Protocol):
    """Told what happens; metrics and log lines hang here."""

    def on_add(self, requests: Sequence[DiffusionRequest]) -> None: ...

    def on_step(self, plan: StepPlan, result: StepResult, seconds: float) -> None: ...

    def on_finish(self, request: DiffusionRequest, timings: dict[str, float], outcome: str, reason: str) -> None:
        """`outcome`: completed | aborted | failed | refused, by the model itself, as wrong; `reason`: in a few words.

        The reason is empty for a completed request. It never quotes what the client sent.
        """

    def on_reject(self, reason: str) -> None:
        """`reason`: queue_full | unavailable, and of servers invalid."""

    def on_worker_restart(self, num_replayed: int) -> None:
        """`num_replayed`: requests that had begun when the worker died, and run again."""


class NullObserver:
    def on_add(self, requests: Sequence[DiffusionRequest]) -> None: ...

    def on_step(self, plan: StepPlan, result: StepResult, seconds: float) -> None: ...

    def on_finish(self, request: DiffusionRequest, timings: dict[str, float], outcome: str, reason: str) -> None: ...

    def on_reject(self, reason: str) -> None: ...

    def on_worker_restart(self, num_replayed: int) -> None: ...


class Observers:
    """Several observers as one, told in order."""

    def __init__(self, *observers: EngineObserver) -> None:
        self._observers = observers

    def on_add(self, requests: Sequence[DiffusionRequest]) -> None:
        for observer in self._observers:
            observer.on_add(requests)

    def on_step(self, plan: StepPlan, result: StepResult, seconds: float) -> None:
        for observer in self._observers:
            observer.on_step(plan, result, seconds)

    def on_finish(self, request: DiffusionRequest, timings: dict[str, float], outcome: str, reason: str) -> None:
        for observer in self._observers:
            observer.on_finish(request, timings, outcome, reason)

    def on_reject(self, reason: str) -> None:
        for observer in self._observers:
            observer.on_reject(reason)

    def on_worker_restart(self, num_replayed: int) -> None:
        for observer in self._observers:
            observer.on_worker_restart(num_replayed)


@contextmanager
def reporting_rejects(observer: EngineObserver) -> Iterator[None]:
    """Tell `observer` of a refusal for want of room or of workers; the error goes on."""
    try:
        yield
    except QueueFullError:
        observer.on_reject("queue_full")
        raise
    except UnavailableError:
        observer.on_reject("unavailable")
        raise
