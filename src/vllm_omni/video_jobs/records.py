"""A video job as the store keeps it, and the claim of a server that runs it."""

from __future__ import annotations

import base64
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from vllm_omni.errors import JobNotFoundError, LeaseLostError, StoreFullError, TooManyJobsError

__all__ = [
    "JOB_STATUSES",
    "MAX_ATTEMPTS",
    "ClaimedJob",
    "JobNotFoundError",
    "JobStatus",
    "LeaseLostError",
    "StoreFullError",
    "TooManyJobsError",
    "VideoJob",
    "creation_time",
    "is_job_id",
    "new_job_id",
]

JobStatus = Literal["queued", "in_progress", "completed", "failed"]
JOB_STATUSES: tuple[JobStatus, ...] = ("queued", "in_progress", "completed", "failed")

_TIME_BYTES, _RANDOM_BYTES = 7, 17
"""Parts of an id before it is encoded as 32 characters."""
_TICKS_PER_SECOND = 1_000_000

MAX_ATTEMPTS = 3
"""Servers in a row that die with a job, without a checkpoint of it between; then it fails, as the job may be why."""


@dataclass(frozen=True)
class VideoJob:
    """A video job. Times are Unix seconds; mappings hold JSON values alone."""

    id: str
    """`video_` and 32 characters that are safe in a URL: see `new_job_id`."""
    owner: str
    """SHA-256 of the API key that made the job, in hex; empty where the server has no keys."""
    model: str
    """Name of the model in the request, or else the first served name."""
    served_model: str
    """First served name of the server: only servers that have the same one claim the job."""
    status: JobStatus
    progress: int
    """Percent from 0 to 100; never falls."""
    created_at: float
    """The time in the id: see `creation_time`."""
    started_at: float | None
    completed_at: float | None
    """Time at which the job completed or failed."""
    expires_at: float | None
    """Time at which an ended job is removed with its files, or a waiting job that no server begins fails."""
    request: Mapping[str, Any]
    """Prompt, negative prompt, fields of `OmniDiffusionSamplingParams` with the drawn seed, output format."""
    shown: Mapping[str, Any]
    """Fields that the API shows: size, seconds, number of frames, frames per second, seed."""
    priority: int
    """Jobs with a smaller one are claimed earlier."""
    work_seconds: float
    """Estimated when the job was made."""
    inputs: tuple[str, ...]
    """Media keys of the input pictures."""
    outputs: Mapping[str, str]
    """Media key of each variant: video, thumbnail, spritesheet."""
    checkpoint: str | None
    """Media key of the newest checkpoint."""
    remixed_from: str | None
    idempotency_key: str | None
    """Key by which the client names its request: the owner's later requests with it get this job."""
    error_code: str | None
    error_message: str | None
    num_attempts: int
    """Claims so far, without those that a server gave back."""


@dataclass(frozen=True)
class ClaimedJob:
    """A job that a server may run until its lease ends."""

    job: VideoJob
    fence: int
    """Number of the claim. It grows with each claim, and a write with an older one is refused."""


def new_job_id(created_at: float) -> str:
    """A new id of a job that is made at a time in Unix seconds. It cannot be guessed: it has 136 random bits."""
    time = round(created_at * _TICKS_PER_SECOND).to_bytes(_TIME_BYTES, "big")
    return f"video_{base64.urlsafe_b64encode(time + secrets.token_bytes(_RANDOM_BYTES)).decode()}"


def creation_time(job_id: str) -> float:
    """Time in an id, in Unix seconds and whole microseconds: the place of a job in lists, also once it is deleted."""
    assert is_job_id(job_id), "the caller checks the form of an id"
    data = base64.urlsafe_b64decode(job_id.removeprefix("video_"))
    return int.from_bytes(data[:_TIME_BYTES], "big") / _TICKS_PER_SECOND


def is_job_id(text: str) -> bool:
    """Whether `text` has the form of a job's id."""
    return re.fullmatch(r"video_[A-Za-z0-9_-]{32}", text) is not None
