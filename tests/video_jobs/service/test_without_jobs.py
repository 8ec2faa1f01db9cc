"""Videos that are made without a job: several of one request, and one that is kept as a completed job."""

from __future__ import annotations

import io
from contextlib import aclosing
from pathlib import Path

import pytest
from PIL import Image

from testbed.fakes import FakeExecutor, FakeRunner
from tests.video_jobs.service.servers import NUM_FRAMES, OWNER, SLOW_DECODE, Server, running_server, until_next_turn
from tests.videos import read
from vllm_omni.diffusion.messages.plan import ItemError
from vllm_omni.errors import GenerationError, InvalidRequestError, JobNotFoundError, QueueFullError
from vllm_omni.jobs import Job
from vllm_omni.video_jobs.encoding import EncodedVideo
from vllm_omni.video_jobs.media import MediaStore


def engine_job(server: Server, num_videos: int) -> Job:
    return server.omni.make_checked_job(server.new_video(num_outputs_per_prompt=num_videos).checked)


async def test_the_videos_of_one_request_are_encoded_as_they_come(tmp_path: Path) -> None:
    async with running_server(tmp_path) as server:
        job = engine_job(server, 3)
        made = {}
        async with aclosing(server.omni.submit(job)) as outputs:
            async for output, encoded in server.videos.encode(job, outputs, "mp4"):
                if encoded is not None:
                    made[output.index] = (output.seeds, len(read(encoded.video)[1]))
                    encoded.remove()
        assert output.finished
        assert output.seeds == [3, 4, 5]
    assert made == {0: ([3], NUM_FRAMES), 1: ([4], NUM_FRAMES), 2: ([5], NUM_FRAMES)}


async def test_a_consumer_that_leaves_cancels_what_is_not_encoded(tmp_path: Path) -> None:
    async with running_server(tmp_path) as server:
        job = engine_job(server, 2)
        async with (
            aclosing(server.omni.submit(job)) as outputs,
            aclosing(server.videos.encode(job, outputs, "mp4")) as videos,
        ):
            _, encoded = await anext(videos)
            assert isinstance(encoded, EncodedVideo)
            scratch = encoded.video.parent.parent
            encoded.remove()
        while any(scratch.iterdir()):  # the files of the other video go in a thread
            await until_next_turn()


async def test_a_request_that_fails_raises_its_error(tmp_path: Path) -> None:
    def fail(request_id: str, phase: str, step: int) -> ItemError | None:
        return ItemError("out of memory", "out_of_memory") if (phase, step) == ("denoise", 2) else None

    device = FakeExecutor(lambda: FakeRunner(ready=SLOW_DECODE, errors=fail))
    async with running_server(tmp_path, device) as server:
        job = engine_job(server, 1)
        async with aclosing(server.omni.submit(job)) as outputs:
            with pytest.raises(GenerationError):
                async for _ in server.videos.encode(job, outputs, "mp4"):
                    pass


async def test_a_remix_reserves_memory_before_it_reads_pictures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture = io.BytesIO()
    Image.new("RGB", (300, 200)).save(picture, "PNG")
    num_read, get = 0, MediaStore.get
    reserved: list[int] = []

    async def counted(self: MediaStore, key: str) -> bytes:
        nonlocal num_read
        num_read += 1
        return await get(self, key)

    def refuse(num_bytes: int) -> None:
        raise QueueFullError("no room", retry_after=1.0)

    async with running_server(tmp_path) as server:
        new = server.new_video(input_files=(picture.getvalue(),))
        job = server.omni.make_checked_job(new.checked)
        async with server.videos.make_now(new, job=job) as encoded:
            kept = await server.videos.keep(new, job, encoded)
        monkeypatch.setattr(MediaStore, "get", counted)
        with pytest.raises(QueueFullError):
            await server.videos.remix(kept.id, OWNER, "a bear", refuse)
        assert num_read == 0
        with pytest.raises(InvalidRequestError, match="image"):  # the model takes none
            await server.videos.remix(kept.id, OWNER, "a bear", reserved.append)
    assert reserved == [len(picture.getvalue()), 2 * 300 * 200 * 3]


async def test_a_kept_video_is_a_completed_job_that_nobody_runs(tmp_path: Path) -> None:
    async with running_server(tmp_path) as server:
        new = server.new_video(input_files=(b"png",))
        job = server.omni.make_checked_job(new.checked)
        async with aclosing(server.omni.submit(job)) as outputs:
            (encoded,) = [files async for _, files in server.videos.encode(job, outputs, "mp4") if files is not None]
        video = encoded.video.read_bytes()
        kept = await server.videos.keep(new, job, encoded)
        encoded.remove()

        view = (await server.view(kept.id)).job
        assert (view.status, view.progress, view.outputs) == ("completed", 100, kept.outputs)
        assert view.expires_at is not None
        content = await server.videos.content(kept.id, OWNER, "video")
        assert b"".join([piece async for piece in content.read()]) == video
        assert len(server.files()) == 4, "three variants and the input"
        with pytest.raises(JobNotFoundError):
            await server.videos.content(kept.id, "somebody else", "video")
        begun = [request for plan in server.device.runner.plans for request in plan.new_requests]
        assert len(begun) == 1, "a server has claimed it"
        await server.videos.delete(kept.id, OWNER)
        assert server.files() == []
