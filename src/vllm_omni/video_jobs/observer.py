"""Observer by which metrics learn of video jobs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from vllm_omni.video_jobs.records import JobStatus


class VideoObserver:
    """Receives everything that metrics report of video jobs; this base class ignores it."""

    def on_job_counts(self, counts: Mapping[JobStatus, int]) -> None:
        """Note the numbers of jobs in the store, by status."""

    def on_job_refused(self, reason: Literal["too_many_jobs", "store_full"]) -> None:
        """Note that a job was not made: its owner has too many, or a store has no room."""

    def on_video_encoded(self, seconds: float) -> None:
        """Note that the files of a video were encoded, in `seconds` of encoding threads."""

    def on_checkpoint_stored(self, seconds: float, num_bytes: int) -> None:
        """Note that a checkpoint of `num_bytes` was written to the media store, in `seconds`."""
