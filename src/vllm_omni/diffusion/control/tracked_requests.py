"""Requests between `DiffusionEngine.add` and their last event: their events, steps and times."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from vllm_omni.diffusion.control.events import (
    Checkpointed,
    EncodeAdvanced,
    EngineEvent,
    EngineObserver,
    Failed,
    Finished,
    Frames,
    Preview,
    Started,
    StepDone,
)
from vllm_omni.diffusion.control.request_errors import outcome_of, request_error
from vllm_omni.diffusion.control.scheduled_request import ScheduledRequest
from vllm_omni.diffusion.messages.checkpoint import Checkpoint
from vllm_omni.diffusion.messages.plan import STAGES, ItemError, StepPlan, StepResult
from vllm_omni.diffusion.messages.request import DiffusionRequest
from vllm_omni.errors import RequestError


@dataclass
class _Work:
    """Seconds and steps spent on a request."""

    stages: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STAGES, 0.0))
    """Device seconds by stage, of the steps that it took part in."""
    num_steps: int = 0
    """Model steps run for it."""
    cached_steps: float = 0.0
    """Sum of the shares of these steps that a step cache supplied."""
    is_tiled: bool = False
    """Whether the VAE decoded it in tiles because the whole did not fit the memory."""

    def copy(self) -> _Work:
        return replace(self, stages=dict(self.stages))


@dataclass
class _Tracked:
    """A request and what is known of its progress."""

    request: ScheduledRequest
    events: asyncio.Queue[EngineEvent]
    started: float | None = None
    """Time at which its first plan began to run."""
    work: _Work = field(default_factory=_Work)
    """Work of this run, and of earlier runs up to the checkpoint that it began from."""
    checkpoint: Checkpoint | None = field(init=False)
    """Newest checkpoint; None: it begins at its first step."""
    saved_work: _Work = field(default_factory=_Work)
    """Work up to the newest checkpoint."""
    last_step: int = field(init=False)
    """Last step that was published, or the step that it resumed at: a replay does not publish it again."""
    encoded_share: float = 0.0
    """Largest published share of the encode: a replay does not publish it again."""
    video: np.ndarray | None = None
    """uint8 [all frames, height, width, 3]: the frames that were published; None before the first of them."""
    num_decoded: int = 0
    """Frames decoded in this run."""
    num_published: int = 0
    """Frames published, also by an earlier run: a replay does not publish them again."""

    def __post_init__(self) -> None:
        self.checkpoint = self.request.resume
        self.last_step = 0 if self.checkpoint is None else self.checkpoint.step

    def add_frames(self, pixels: np.ndarray) -> Frames | None:
        """Add the next decoded frames to the video; returns the event for those that were not published before."""
        if self.video is None:
            self.video = np.empty((self.request.request.num_frames, *pixels.shape[1:]), np.uint8)
        start, end = self.num_decoded, self.num_decoded + len(pixels)
        first, self.num_decoded = max(start, self.num_published), end
        if first >= end:
            return None
        self.video[first:end] = pixels[first - start :]
        self.num_published = end
        return Frames(self.request.request_id, first, self.video[first:end])

    def timings(self, now: float) -> dict[str, float]:
        """Seconds since its arrival by stage, and numbers of steps; `vae_tiling` (True) if tiling turned itself on."""
        arrival = self.request.arrival
        queue = (now if self.started is None else self.started) - arrival
        work = self.work
        steps = {"computed_steps": work.num_steps - work.cached_steps, "cached_steps": work.cached_steps}
        tiling = {"vae_tiling": True} if work.is_tiled else {}
        return {"queue": queue, **work.stages, "total": now - arrival, **steps, **tiling}


class TrackedRequests:
    """Requests by id. Puts their events into their queues and reports their ends to the observer."""

    def __init__(self, observer: EngineObserver) -> None:
        self._observer = observer
        self._tracked: dict[str, _Tracked] = {}
        self._is_empty = asyncio.Event()
        self._is_empty.set()
        self._next_end = asyncio.Event()
        """Set at the end of a request, and replaced by a new one."""

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._tracked

    @property
    def ids(self) -> list[str]:
        return list(self._tracked)

    async def wait_until_empty(self) -> None:
        """Wait until every request has ended."""
        await self._is_empty.wait()

    async def wait_for_ends(self, is_meant: Callable[[DiffusionRequest], bool]) -> None:
        """Wait until all requests of now for which `is_meant` holds have ended."""
        meant = [request_id for request_id, its in self._tracked.items() if is_meant(its.request.request)]
        while not self._tracked.keys().isdisjoint(meant):
            await self._next_end.wait()

    def add(self, requests: Sequence[ScheduledRequest], events: asyncio.Queue[EngineEvent]) -> None:
        """Track `requests`, whose events go into `events`."""
        for request in requests:
            self._tracked[request.request_id] = _Tracked(request, events)
            self._is_empty.clear()

    def request(self, request_id: str) -> DiffusionRequest:
        """Request of this id, as workers get it."""
        return self._tracked[request_id].request.request

    def note_started(self, request_ids: Iterable[str], now: float) -> None:
        """Note that the first plan of these requests began at `now`; a replay does not count."""
        for request_id in request_ids:
            if (tracked := self._tracked.get(request_id)) and tracked.started is None:
                tracked.started = now
                tracked.events.put_nowait(Started(request_id))

    def count(self, plan: StepPlan, result: StepResult) -> None:
        """Add the seconds and the steps of a plan to its requests."""
        request_ids = (plan.encode, result.advanced, plan.decode)
        seconds = (result.encode_seconds, result.denoise_seconds, result.decode_seconds)
        for stage, ids, stage_seconds in zip(STAGES, request_ids, seconds, strict=True):
            for tracked in self._known(ids):
                tracked.work.stages[stage] += stage_seconds
        for tracked in self._known(result.tiled):
            tracked.work.is_tiled = True
        for tracked in self._known(result.advanced):
            tracked.work.num_steps += result.num_made(tracked.request.request_id)
            tracked.work.cached_steps += result.cached.get(tracked.request.request_id, 0.0)

    def publish_encoded(self, request_id: str, share: float) -> None:
        """Put the event of a piece of the encode into the request's queue."""
        tracked = self._tracked[request_id]
        if share > tracked.encoded_share:
            tracked.encoded_share = share
            tracked.events.put_nowait(EncodeAdvanced(request_id, share))

    def publish_step(self, request_id: str, step: int, preview: np.ndarray | None) -> None:
        """Put the events of a denoising step into the request's queue."""
        tracked = self._tracked[request_id]
        if step > tracked.last_step:
            tracked.last_step = step
            tracked.events.put_nowait(StepDone(request_id, step))
        if preview is not None:
            tracked.events.put_nowait(Preview(request_id, step, preview))

    def publish_checkpoint(self, request_id: str, checkpoint: Checkpoint | None) -> None:
        """Put a checkpoint, which may have been published before, into the request's queue."""
        tracked = self._tracked[request_id]
        if checkpoint is not None and checkpoint is not tracked.checkpoint:
            tracked.checkpoint, tracked.saved_work = checkpoint, tracked.work.copy()
        tracked.events.put_nowait(Checkpointed(request_id, checkpoint))

    def publish_frames(self, request_id: str, pixels: np.ndarray) -> None:
        """Put the next frames of a video into the request's queue."""
        tracked = self._tracked[request_id]
        if (frames := tracked.add_frames(pixels)) is not None:
            tracked.events.put_nowait(frames)

    def start_again(self, request_ids: Iterable[str]) -> None:
        """Forget the times and steps since the newest checkpoint, and decoded frames, of requests that are replayed."""
        for tracked in self._known(request_ids):
            tracked.work, tracked.num_decoded = tracked.saved_work.copy(), 0

    def finish(self, request_id: str, image: np.ndarray | None) -> None:
        """End a request with its picture, or with the video whose frames were published (None)."""
        pixels = self._tracked[request_id].video if image is None else image
        assert pixels is not None, "a request is finished after its last decode"
        self.end(request_id, pixels)

    def fail(self, request_id: str, error: ItemError) -> None:
        """End a request with a worker's error. Unknown ids are ignored."""
        if request_id in self:
            self.end(request_id, request_error(error, self.request(request_id).loras))

    def end(self, request_id: str, outcome: np.ndarray | RequestError) -> None:
        """Put the last event, pixels or an error, into the request's queue and forget the request."""
        tracked = self._tracked.pop(request_id)
        timings = tracked.timings(time.monotonic())
        if isinstance(outcome, RequestError):
            tracked.events.put_nowait(Failed(request_id, outcome))
            self._observer.on_finish(tracked.request.request, timings, *outcome_of(outcome))
        else:
            tracked.events.put_nowait(Finished(request_id, outcome, timings))
            self._observer.on_finish(tracked.request.request, timings, "completed", "")
        self._next_end.set()
        self._next_end = asyncio.Event()
        if not self._tracked:
            self._is_empty.set()

    def _known(self, request_ids: Iterable[str]) -> list[_Tracked]:
        return [self._tracked[request_id] for request_id in request_ids if request_id in self._tracked]
