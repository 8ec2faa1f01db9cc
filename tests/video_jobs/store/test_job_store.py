"""Life of a job in the store."""

from __future__ import annotations

import pytest

from tests.video_jobs.store.jobs import new_job
from vllm_omni.video_jobs.records import JobNotFoundError, LeaseLostError
from vllm_omni.video_jobs.store.job_store import JobStore


async def test_a_job_is_published_claimed_and_completed(store: JobStore) -> None:
    job = new_job(inputs=("a/inputs/0.png",))
    await store.add(job)
    with pytest.raises(JobNotFoundError):
        await store.get(job.id, job.owner)
    await store.publish(job.id)
    (claimed,) = await store.claim("one", job.served_model, 5)
    assert claimed.job.inputs == job.inputs
    await store.note_started(job.id, claimed.fence)
    await store.complete(job.id, claimed.fence, {"video": "a/1/video.mp4"})
    done = await store.get(job.id, job.owner)
    assert (done.status, done.progress, done.outputs) == ("completed", 100, {"video": "a/1/video.mp4"})
    with pytest.raises(LeaseLostError):
        await store.fail(job.id, claimed.fence, "late", "late")
