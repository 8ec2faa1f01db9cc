"""Two server processes on one SQLite file: one is killed, and the other completes its job."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest

from tests.entrypoints.cli.server_process import OutputReader
from tests.video_jobs.service.server_process import LEASE_SECONDS
from tests.video_jobs.service.servers import OWNER, store_settings, until_next_turn
from vllm_omni.video_jobs.media import MediaStore
from vllm_omni.video_jobs.records import VideoJob, new_job_id
from vllm_omni.video_jobs.store import open_store
from vllm_omni.video_jobs.store.job_store import JobStore

NUM_STEPS = 60


@contextmanager
def server(folder: Path, num_steps: int | None = None) -> Iterator[tuple[subprocess.Popen[str], OutputReader]]:
    command = [sys.executable, "-m", "tests.video_jobs.service.server_process", str(folder)]
    process = subprocess.Popen(
        command + ([] if num_steps is None else [str(num_steps)]),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    output = OutputReader(process)
    try:
        yield process, output
        if process.poll() is None:
            assert process.stdin is not None
            process.stdin.close()
            process.wait()
    finally:
        process.kill()
        process.wait()
        output.join()
        if process.stdin is not None:
            process.stdin.close()


def frames_of(path: Path) -> np.ndarray:
    """uint8 [frames, height, width, 3]."""
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


@asynccontextmanager
async def stores_of(folder: Path) -> AsyncIterator[tuple[JobStore, MediaStore]]:
    settings = store_settings(folder)
    store = open_store(settings.job_store_url, lease_seconds=LEASE_SECONDS, job_ttl_seconds=3600)
    media = MediaStore.open(settings.media_store_url)
    yield store, media
    await media.close()
    await store.close()


async def until_job(store: JobStore, job_id: str, holds: Callable[[VideoJob], bool]) -> VideoJob:
    """The job once `holds(job)`."""
    while not holds(job := await store.get(job_id, OWNER)):
        await until_next_turn()
    return job


def has_ended(job: VideoJob) -> bool:
    return job.completed_at is not None


async def add_again(store: JobStore, job: VideoJob) -> str:
    """Add a job like `job`; return its id."""
    again = replace(
        job, id=new_job_id(job.created_at), status="queued", progress=0, completed_at=None, outputs={}, num_attempts=0
    )
    await store.add(again)
    await store.publish(again.id)
    return again.id


@pytest.mark.thorough
async def test_a_job_of_a_killed_process_is_completed_by_another_with_the_same_frames(tmp_path: Path) -> None:
    async with stores_of(tmp_path) as (store, media):
        with server(tmp_path, NUM_STEPS) as (first, first_output):
            job_id = await asyncio.to_thread(lambda: first_output.wait_for(r"job (video_\S+)")[1])
            begun = await until_job(store, job_id, lambda job: has_ended(job) or job.checkpoint is not None)
            assert not has_ended(begun), "the job is too short for this test"
            first.send_signal(signal.SIGKILL)
            with server(tmp_path) as (_, second_output):
                ended = await until_job(store, job_id, has_ended)
                calm = await until_job(store, await add_again(store, ended), has_ended)
                assert f"{job_id} goes on after step" in second_output.text
        assert (ended.status, ended.num_attempts) == ("completed", 2)
        for number, video in enumerate((ended, calm)):
            (tmp_path / f"{number}.mp4").write_bytes(await media.get(video.outputs["video"]))
        made, expected = frames_of(tmp_path / "0.mp4"), frames_of(tmp_path / "1.mp4")
        assert made.shape == expected.shape
        # The servers may use different numbers of threads, which round differently.
        assert np.abs(made.astype(int) - expected).mean() < 1
        stored = sorted(str(file.relative_to(tmp_path / "media")) for file in (tmp_path / "media").rglob("*.*"))
        assert stored == sorted((*ended.outputs.values(), *calm.outputs.values()))
