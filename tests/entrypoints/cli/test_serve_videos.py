"""`vllm serve demo-video --omni`, as users start it: a restart loses no job."""

from __future__ import annotations

import io
from pathlib import Path

import av
import httpx
import openai
import pytest

from testbed.patience import GUARD_SECONDS, wait_for
from tests.entrypoints.cli.server_process import ServerProcess, server_process, stop

NUM_STEPS, NUM_FRAMES = 120, 5


def flags(folder: Path) -> tuple[str, ...]:
    return (
        *("--host", "127.0.0.1", "--port", "0", "--job-store", f"sqlite:///{folder}/jobs.sqlite"),
        *("--shutdown-timeout", f"{GUARD_SECONDS}", "--checkpoint-seconds", "1"),
    )


def client_of(server: ServerProcess) -> openai.OpenAI:
    url = server.address()
    server.wait_until_ready()
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


@pytest.mark.thorough
@pytest.mark.filterwarnings("ignore:The Sora API:DeprecationWarning")
def test_a_job_survives_sigterm_and_a_new_server_completes_it(tmp_path: Path) -> None:
    with server_process(*flags(tmp_path), model="demo-video") as server, client_of(server) as sdk:
        steps = {"num_inference_steps": NUM_STEPS, "num_frames": NUM_FRAMES, "seed": 3}
        video = sdk.videos.create(prompt="a red ball", extra_body=steps)
        begun = wait_for(lambda: (found := sdk.videos.retrieve(video.id)).progress > 2 and found)
        assert begun.status == "in_progress"
        assert stop(server) == 0
        assert f"{video.id} completed" not in server.output, "the job is too short for this test"
        assert server.survivors() == []
    with server_process(*flags(tmp_path), model="demo-video") as server, client_of(server) as sdk:
        done = sdk.videos.poll(video.id, poll_interval_ms=200)
        assert (done.status, done.progress) == ("completed", 100)
        assert "goes on after step" in server.output
        with av.open(io.BytesIO(sdk.videos.download_content(video.id).content), "r") as container:
            assert len(list(container.decode(video=0))) == NUM_FRAMES
        metrics = httpx.get(f"{server.address()}/metrics").text
        assert 'vllm_omni:video_jobs{model_name="demo-video",status="completed"}' in metrics
        sdk.videos.delete(video.id)
        files = tmp_path / "media"
        assert wait_for(lambda: not [file for file in files.rglob("*") if file.is_file()])
        assert stop(server) == 0
