"""Jobs of the tests."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from vllm_omni.video_jobs.records import VideoJob, new_job_id

JOB = VideoJob(
    id="",
    owner="a key's hash",
    model="demo-video",
    served_model="demo-video",
    status="queued",
    progress=0,
    created_at=1000.0,
    started_at=None,
    completed_at=None,
    expires_at=None,
    request={"prompt": "a rocket", "params": {"seed": 7, "fps": 8.0}},
    shown={"size": "64x64", "seconds": "2.125"},
    priority=0,
    work_seconds=1.5,
    inputs=(),
    outputs={},
    checkpoint=None,
    remixed_from=None,
    error_code=None,
    error_message=None,
    num_attempts=0,
)


def new_job(**fields: Any) -> VideoJob:
    return replace(JOB, **{"id": new_job_id(), **fields})
