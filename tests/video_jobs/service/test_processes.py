"""Two server processes on one SQLite file: one is killed or drained, and the other completes its job."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import av
import numpy as np
import pytest

from testbed.patience import until
from tests.entrypoints.cli.server_process import OutputReader
from tests.video_jobs.service.server_process import LEASE_SECONDS
from tests.video_jobs.service.servers import OWNER, store_settings
from vllm_omni.video_jobs.media import MediaStore
from vllm_omni.video_jobs.records import VideoJob
from vllm_omni.video_jobs.store import open_store

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


def frames_of(path: Path) -> np.ndarray:
    """uint8 [frames, height, width, 3]."""
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


@pytest.mark.thorough
@pytest.mark.parametrize("is_killed", [True, False], ids=["killed", "drained"])
async def test_a_job_of_a_process_that_ends_is_completed_by_another_with_the_same_frames(
    tmp_path: Path, is_killed: bool
) -> None:
    settings = store_settings(tmp_path, lease_seconds=LEASE_SECONDS)
    store = open_store(settings.job_store_url, lease_seconds=LEASE_SECONDS, job_ttl_seconds=3600)
    media = MediaStore.open(settings.media_store_url)

    async def job(job_id: str) -> VideoJob:
        return await store.get(job_id, OWNER)

    async def until_ended(job_id: str) -> VideoJob:
        while (found := await job(job_id)).completed_at is None:
            await until(lambda: True)
        return found

    with server(tmp_path, NUM_STEPS) as (first, first_output), server(tmp_path) as (_, second_output):
        job_id = first_output.wait_for(r"job (video_\S+)")[1]
        # Whichever server has claimed it: the other one is to complete it.
        while (begun := await job(job_id)).checkpoint is None and begun.completed_at is None:
            await until(lambda: True)
        assert begun.completed_at is None, "the job is too short for this test"
        claimed_by_first = "attempt 1 begins" in first_output.text
        if claimed_by_first:
            if is_killed:
                first.send_signal(signal.SIGKILL)
            else:
                assert first.stdin is not None
                first.stdin.close()
        ended = await until_ended(job_id)
        assert ended.status == "completed"
        if claimed_by_first:
            assert "goes on after step" in second_output.text
            assert ended.num_attempts == (2 if is_killed else 1)
    with server(tmp_path, NUM_STEPS) as (_, output):
        calm = await until_ended(output.wait_for(r"job (video_\S+)")[1])
    for number, video in enumerate((ended, calm)):
        (tmp_path / f"{number}.mp4").write_bytes(await media.get(video.outputs["video"]))
    made, expected = frames_of(tmp_path / "0.mp4"), frames_of(tmp_path / "1.mp4")
    assert made.shape == expected.shape
    # The servers may use different numbers of threads, which round differently.
    assert np.abs(made.astype(int) - expected).mean() < 1
    stored = sorted(str(file.relative_to(tmp_path / "media")) for file in (tmp_path / "media").rglob("*.*"))
    assert stored == sorted((*ended.outputs.values(), *calm.outputs.values()))
    await media.close()
    await store.close()
