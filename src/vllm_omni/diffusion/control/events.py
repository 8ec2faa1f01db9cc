"""Events of requests, the status of an engine, and the observer that metrics and log lines are written by."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from vllm_omni.diffusion.messages.checkpoint import Checkpoint
from vllm_omni.diffusion.messages.plan import StepPlan, StepResult
from vllm_omni.diffusion.messages.request import DiffusionRequest
from vllm_omni.errors import QueueFullError, RequestError, UnavailableError


@dataclass(frozen=True)
class Started:
    """The first plan of a request began to run."""

    request_id: str


@dataclass(frozen=True)
class EncodeAdvanced:
    """A piece of a request's conditioning video is encoded."""

    request_id: str
    share: float
    """Share of the encode that is done, up to 1."""


@dataclass(frozen=True)
class StepDone:
    """A denoising step of a request is done."""

    request_id: str
    step: int
    """Denoising steps done."""


@dataclass(frozen=True)
class Preview:
    """Picture decoded from an unfinished request."""

    request_id: str
    step: int
    image: np.ndarray
    """Pixels: uint8 [height, width, 3]."""


@dataclass(frozen=True)
class Frames:
    """Finished frames of a video whose further frames are still decoded; `Finished` has them all."""

    request_id: str
    first: int
    """Number of the first of these frames, from 0."""
    pixels: np.ndarray
    """uint8 [frames, height, width, 3]."""


@dataclass(frozen=True)
class Checkpointed:
    """A checkpoint of a request was taken, by itself or because it was asked for."""

    request_id: str
    checkpoint: Checkpoint | None
    """None: it was asked for, and there is nothing to go on from."""


@dataclass(frozen=True)
class Finished:
    """Last event of a request that succeeded."""

    request_id: str
    image: np.ndarray
    """Pixels: uint8 [height, width, 3], of a video [frames, height, width, 3]."""
    timings: dict[str, float]
    """Seconds by stage, and numbers of computed and cached steps."""


@dataclass(frozen=True)
class Failed:
    """Last event of a request that failed."""

    request_id: str
    error: RequestError


EngineEvent = Started | EncodeAdvanced | StepDone | Preview | Checkpointed | Frames | Finished | Failed


@dataclass(frozen=True)
class EngineStatus:
    """State and load of an engine, or of all replicas together."""

    state: str
    """starting | running | restarting | sleeping | draining | stopped | failed"""
    num_running: int
    num_waiting: int
    queue_seconds: float
    healthy: bool
    """Whether all workers are alive and run plans."""
    attention_backends: tuple[str, ...] = ()
    """Names of the attention backends of all replicas."""
    failure: str = ""
    """Reason of the state `failed`."""
    sleep_level: int = 0
    """1: the weights are in host memory, 2: the workers have ended; 0: awake, or on the way to sleep."""


class EngineObserver:
    """Receives everything that metrics and log lines report; this base class ignores it."""

    def on_add(self, requests: Sequence[DiffusionRequest]) -> None: ...

    def on_step(self, plan: StepPlan, result: StepResult, seconds: float) -> None: ...

    def on_checkpoint(self, request: DiffusionRequest, num_bytes: int, seconds: float) -> None:
        """Note a checkpoint of `num_bytes`, for whose copy to the host the step's result waited `seconds`."""

    def on_finish(self, request: DiffusionRequest, timings: dict[str, float], outcome: str, reason: str) -> None:
        """Note the end of a request.

        `outcome`: completed | aborted | given back (the video job of the request goes back to the store) | failed |
        refused (the model found the request invalid).
        `reason`: a few words, empty for a completed request. It never quotes the client's text.
        """

    def on_reject(self, reason: str) -> None:
        """Note a refused request. `reason`: queue_full | unavailable; an HTTP server also reports invalid."""

    def on_worker_restart(self, num_replayed: int) -> None:
        """Note a restart of the workers. `num_replayed`: requests that had begun and start again."""


class Observers(EngineObserver):
    """Several observers as one, called in order."""

    def __init__(self, *observers: EngineObserver) -> None:
        self._observers = observers

    def on_add(self, requests: Sequence[DiffusionRequest]) -> None:
        for observer in self._observers:
            observer.on_add(requests)

    def on_step(self, plan: StepPlan, result: StepResult, seconds: float) -> None:
        for observer in self._observers:
            observer.on_step(plan, result, seconds)

    def on_checkpoint(self, request: DiffusionRequest, num_bytes: int, seconds: float) -> None:
        for observer in self._observers:
            observer.on_checkpoint(request, num_bytes, seconds)

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
    """Report QueueFullError and UnavailableError to `observer`, and raise them again."""
    try:
        yield
    except QueueFullError:
        observer.on_reject("queue_full")
        raise
    except UnavailableError:
        observer.on_reject("unavailable")
        raise
