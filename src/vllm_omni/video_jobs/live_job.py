"""A job that this server runs: its claim, and its newest progress and preview for whoever watches it."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from enum import Enum

import numpy as np

from vllm_omni.jobs import Job
from vllm_omni.omni import AsyncOmni
from vllm_omni.video_jobs.checkpoint_writer import CheckpointWriter
from vllm_omni.video_jobs.records import ClaimedJob


class StopReason(Enum):
    """Reason why a server stops running a job before its end."""

    GONE = "gone"
    """Deleted, or claimed by another server: nothing more is written to the store."""
    DRAIN = "drain"
    """This server ends: the job goes back to the store with a checkpoint."""
    CROWDED = "crowded"
    """This server could not begin the job soon, or sleeps; another one may run it."""


@dataclass(eq=False)
class LiveJob:
    """A claimed job, from its claim until this server has nothing more to do for it."""

    claim: ClaimedJob
    percent: int
    """Progress, which never falls. Clients see it once it is stored."""
    claimed_at: float = field(default_factory=time.monotonic)
    """Time of the claim, by the clock `time.monotonic`."""
    has_started: bool = False
    """Whether the engine has begun to work on it."""
    is_made: bool = False
    """Whether all its frames are decoded."""
    num_begins: int = 0
    """Requests that the engine has got for it."""
    request: Job | None = None
    """The engine's newest job for it."""
    preview: np.ndarray | None = None
    """Newest preview: uint8 [height, width, 3]."""
    checkpoints: CheckpointWriter | None = None
    checkpointed: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when the engine has answered a request for a checkpoint, made because the server drains."""
    unrecorded: set[str] = field(default_factory=set)
    """Media keys of files that no row names yet."""
    stop_reason: StopReason | None = None
    is_ending: bool = False
    """Whether the store is being told how the job ended: the store refuses this if the claim does not hold any more."""
    task: asyncio.Task[None] | None = None
    """Task of `JobRunner.run`."""
    start_note: asyncio.Task[None] | None = None
    """Task that notes the start in the store."""
    _changed: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def id(self) -> str:
        return self.claim.job.id

    @property
    def folder(self) -> str:
        """Prefix, without a slash, of the media keys that this claim writes."""
        return f"{self.id}/{self.claim.fence}"

    @property
    def is_over(self) -> bool:
        return self.task is not None and self.task.done()

    def stop_gone(self) -> bool:
        """Stop a job that was deleted, or that another server has claimed. Returns whether this call stops it.

        Renewals report a job again and again until its lease is dropped: it is stopped once.
        """
        if self.task is None or self.is_ending or self.stop_reason is StopReason.GONE:
            return False
        self.stop_reason = StopReason.GONE
        self.task.cancel()
        return True

    def let_go(self, omni: AsyncOmni) -> None:
        """Stop a job that goes back to the store: its request in the engine, and its task."""
        assert self.task is not None
        if self.request is not None:
            omni.give_back(self.request.request_id)
        self.task.cancel()

    def note_change(self) -> None:
        """Wake everyone who waits for a change of the row or the preview. A slow watcher sees the newest state only."""
        self._changed.set()
        self._changed = asyncio.Event()

    @property
    def next_change(self) -> asyncio.Event:
        """Event of the next change. Taken before the state is read, so that no change is missed."""
        return self._changed
