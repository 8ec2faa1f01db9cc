"""Jobs that a server has claimed and cannot begin: another server of the same store may run them at once."""

from __future__ import annotations

import time
from collections.abc import Mapping

from vllm_omni.jobs import Job
from vllm_omni.omni import AsyncOmni
from vllm_omni.video_jobs.live_job import LiveJob

PATIENCE_SECONDS = 3.0
"""Least time for which a claimed job may wait for the engine."""
PATIENCE_STEPS = 3
"""Steps for which it may wait: it joins between two steps, and the next ones may be planned already."""
SOON_SECONDS = 2.0
"""A job whose estimated wait is shorter stays, so that the device never idles while the next job is prepared."""
CROWDED_SECONDS = 30.0
"""Time after which a crowded server tries again: the next job may be smaller."""


class Crowding:
    """Decides which claimed jobs go back to the store, and for how long no other one is claimed then."""

    def __init__(self, omni: AsyncOmni, live: Mapping[str, LiveJob]) -> None:
        """`live`: jobs that this server runs, by id."""
        self._omni = omni
        self._live = live
        self._crowd: frozenset[str] = frozenset()
        """Jobs that were running when a job went back."""
        self._until = 0.0

    def waiting_too_long(self) -> list[LiveJob]:
        """Claimed jobs that the engine has not begun and will not begin soon; the server is crowded from now on."""
        now = time.monotonic()
        late = [live for live in self._live.values() if self._waits_too_long(live, now)]
        if late:
            self._crowd, self._until = frozenset(self._running), now + CROWDED_SECONDS
        return late

    @property
    def is_crowded(self) -> bool:
        """Whether a job that is claimed now would only wait here."""
        if time.monotonic() >= self._until:
            return False
        if not self._crowd <= self._running.keys() or self._omni.status().queue_seconds < SOON_SECONDS:
            self._until = 0.0
            return False
        return all(self._omni.eta_seconds(request) >= SOON_SECONDS for request in self._running.values())

    @property
    def _running(self) -> dict[str, Job]:
        """Engine's requests of the jobs that it works on, by job."""
        return {
            id: live.request
            for id, live in self._live.items()
            if live.has_started and not live.is_made and live.request is not None
        }

    def _waits_too_long(self, live: LiveJob, now: float) -> bool:
        if live.has_started or live.stop_reason is not None or live.request is None:
            return False
        step_seconds = sum(self._step_seconds(request) for request in self._running.values())
        if now - live.claimed_at < max(PATIENCE_SECONDS, PATIENCE_STEPS * step_seconds):
            return False
        return self._omni.eta_seconds(live.request) - self._omni.work_seconds(live.request) >= SOON_SECONDS

    def _step_seconds(self, request: Job) -> float:
        """Estimated time of one denoising step, or a little more."""
        num_steps = min(scheduled.request.num_inference_steps for scheduled in request.requests)
        return self._omni.work_seconds(request) / num_steps
