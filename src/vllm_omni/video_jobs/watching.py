"""Events of a job for clients that listen, instead of asking again and again."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from vllm_omni.video_jobs.live_job import LiveJob
from vllm_omni.video_jobs.views import JobViews, VideoView

if TYPE_CHECKING:
    from vllm_omni.video_jobs.store.job_store import JobStore

MAX_LOOKS_PER_SECOND = 50.0
"""Jobs that are looked up again in a second, of all that clients listen to; each takes one or two short queries."""


@dataclass(frozen=True, eq=False)
class Progress:
    """The status or the progress of a job has changed; also the first event of each listener."""

    view: VideoView


@dataclass(frozen=True, eq=False)
class PreviewImage:
    """A new preview of the video. Only the server that runs the job has previews."""

    view: VideoView
    pixels: np.ndarray
    """uint8 [height, width, 3]."""


@dataclass(frozen=True, eq=False)
class Ended:
    """Last event: the job has completed or failed."""

    view: VideoView


VideoEvent = Progress | PreviewImage | Ended
"""Event of a job, one object for all its listeners, so that its bytes can be shared too."""


class JobWatcher:
    """Makes the events of jobs from their newest state: a slow listener misses some, and none are kept for it.

    All listeners of a job share one look-up.
    """

    def __init__(self, store: JobStore, views: JobViews, live: Mapping[str, LiveJob], look_seconds: float) -> None:
        """`look_seconds`: interval at which a job is looked up that waits, or that another server runs.

        It is longer while clients listen to many jobs: see `MAX_LOOKS_PER_SECOND`.
        """
        self._store = store
        self._views = views
        self._live = live
        self._look_seconds = look_seconds
        self._watches: dict[tuple[str, str], WatchedJob] = {}
        """By id and owner: jobs that have listeners."""

    async def events(self, job_id: str, owner: str) -> AsyncGenerator[VideoEvent]:
        """Events from now on, until the job has ended. Raises JobNotFoundError, also when the job is deleted."""
        with self._listening(job_id, owner) as watch:
            first_look = watch.ask()  # its client may have seen a newer state than the last look-up
            shown: list[VideoEvent] = []
            while True:
                change, newest = watch.next_change, watch.newest
                if watch.failure is not None:
                    raise watch.failure
                if watch.num_looks >= first_look:
                    for event in newest:
                        if event not in shown:
                            yield event
                    if newest and isinstance(newest[-1], Ended):
                        return
                    shown = newest
                await change.wait()

    @contextmanager
    def _listening(self, job_id: str, owner: str) -> Iterator[WatchedJob]:
        """State of a job, which is looked up as long as somebody listens."""
        key = job_id, owner
        watch = self._watches.get(key)
        if watch is None or watch.is_over:
            watch = self._watches[key] = WatchedJob()
            watch.task = asyncio.create_task(self._watch(watch, job_id, owner), name=f"watch {job_id}")
        watch.num_listeners += 1
        try:
            yield watch
        finally:
            watch.num_listeners -= 1
            if not watch.num_listeners:
                assert watch.task is not None
                watch.task.cancel()
                if self._watches.get(key) is watch:
                    del self._watches[key]

    async def _watch(self, watch: WatchedJob, job_id: str, owner: str) -> None:
        """Look a job up until it has ended, or until it cannot be read."""
        while not watch.is_over:
            live = self._live.get(job_id)
            wakes = [watch.begin_look()] if live is None else [watch.begin_look(), live.next_change]
            try:
                view = await self._views.view(await self._store.get(job_id, owner))
            except Exception as error:  # also a bug of ours: the listeners must not wait for ever
                watch.fail(error)
            else:
                watch.show(view, live)
                await self._pause(wakes)

    async def _pause(self, wakes: list[asyncio.Event]) -> None:
        """Wait for the next listener or change here, but not for longer than another server's change would take."""
        seconds = max(self._look_seconds, len(self._watches) / MAX_LOOKS_PER_SECOND)
        waits = [asyncio.ensure_future(event.wait()) for event in wakes]
        try:
            await asyncio.wait(waits, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()


class WatchedJob:
    """Newest state of a job, as events for all its listeners."""

    def __init__(self) -> None:
        self.task: asyncio.Task[None] | None = None
        """Task that looks the job up."""
        self.num_listeners = 0
        self.num_looks = 0
        """Number of the newest look-up that has ended."""
        self.newest: list[VideoEvent] = []
        """Newest progress and preview, or the end alone. Replaced, never changed."""
        self.failure: Exception | None = None
        self._num_begun = 0
        self._preview: np.ndarray | None = None
        self._asked, self._changed = asyncio.Event(), asyncio.Event()

    @property
    def is_over(self) -> bool:
        """Whether there is nothing more to look up."""
        return self.failure is not None or (bool(self.newest) and isinstance(self.newest[-1], Ended))

    @property
    def next_change(self) -> asyncio.Event:
        """Event of the next look-up's end. Taken before the state is read, so that none is missed."""
        return self._changed

    def ask(self) -> int:
        """Ask for a look-up that begins after this call. Returns its number."""
        self._asked.set()
        return self._num_begun + 1

    def begin_look(self) -> asyncio.Event:
        """Count a look-up. Returns the event that asks for the next one."""
        self._asked.clear()
        self._num_begun += 1
        return self._asked

    def show(self, view: VideoView, live: LiveJob | None) -> None:
        """Take the result of a look-up, and the preview of a job that runs here."""
        if view.job.completed_at is not None:
            self._note([Ended(view)])
            return
        progress, *previews = self.newest or [Progress(view)]
        if _state(progress.view) != _state(view):
            progress = Progress(view)
        if live is not None and live.preview is not None and live.preview is not self._preview:
            self._preview = live.preview
            previews = [PreviewImage(view, live.preview)]
        self._note([progress, *previews])

    def fail(self, error: Exception) -> None:
        """Take the failure of a look-up, which ends all streams of the job."""
        self.failure = error
        self._note(self.newest)

    def _note(self, newest: list[VideoEvent]) -> None:
        self.newest, self.num_looks = newest, self._num_begun
        self._changed.set()
        self._changed = asyncio.Event()


def _state(view: VideoView) -> tuple[str, int]:
    """The part of a view whose change is an event."""
    return view.job.status, view.job.progress
