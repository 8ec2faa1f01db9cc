"""Life of a job on one server: from its creation to its files, its failure or its deletion."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import av
import pytest

from testbed.fakes import FakeExecutor, FakeRunner
from testbed.patience import until
from tests.video_jobs.service.servers import NUM_FRAMES, OWNER, SLOW_DECODE, Server, running_server
from vllm_omni.diffusion.messages.plan import ItemError
from vllm_omni.errors import InvalidRequestError, JobNotFoundError, QueueFullError, TooManyJobsError
from vllm_omni.video_jobs import lease_keeper
from vllm_omni.video_jobs.encoding import VideoWriteError
from vllm_omni.video_jobs.lease_keeper import LeaseKeeper
from vllm_omni.video_jobs.media import MediaStoreFullError
from vllm_omni.video_jobs.observer import VideoObserver
from vllm_omni.video_jobs.store.job_store import JobStore
from vllm_omni.video_jobs.watching import Ended, PreviewImage, Progress, VideoEvent


def held_device() -> FakeExecutor:
    """Device that runs plans when it is told to."""
    return FakeExecutor(lambda: FakeRunner(ready=SLOW_DECODE), hold=True)


async def run_until(device: FakeExecutor, condition: Any) -> None:
    """Run the plans of a held device one by one until `condition()` holds."""
    while not condition():
        if device.pending:
            device.release_results()
        await asyncio.sleep(0.001)


async def test_a_job_becomes_three_files(tmp_path: Path) -> None:
    async with running_server(tmp_path) as server:
        created = await server.create()
        assert (created.status, created.progress) == ("queued", 0)
        events: list[VideoEvent] = [event async for event in server.videos.events(created.id, OWNER)]
        job = (await server.view(created.id)).job
        assert (job.status, job.progress, job.num_attempts) == ("completed", 100, 1)
        assert server.files() == sorted(job.outputs.values()), "and no checkpoint"
        video = await server.videos.content(job.id, OWNER, "video")
        data = b"".join([piece async for piece in video.read()])
        assert (video.content_type, video.file_name, len(data)) == ("video/mp4", f"{job.id}.mp4", video.size)
        (tmp_path / "video.mp4").write_bytes(data)
        with av.open(str(tmp_path / "video.mp4")) as container:
            frames = list(container.decode(video=0))
        assert len(frames) == NUM_FRAMES
        assert (frames[0].width, frames[0].height) == (96, 64)
        for variant, kind in (("thumbnail", "image/webp"), ("spritesheet", "image/jpeg")):
            assert (await server.videos.content(job.id, OWNER, variant)).content_type == kind
    shown = [event.view.job for event in events]
    assert isinstance(events[-1], Ended)
    assert all(one.progress <= next.progress for one, next in itertools.pairwise(shown))


async def test_a_job_is_in_progress_once_the_engine_works_on_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease_keeper, "PROGRESS_SECONDS", 0.001)
    device = held_device()
    async with running_server(tmp_path, device) as server:
        job = await server.create(num_inference_steps=20)
        await until(lambda: device.pending)
        view = await server.view(job.id)
        assert view.job.status in ("queued", "in_progress")
        assert view.eta_seconds is not None
        assert view.eta_seconds > 0
        seen: list[tuple[int, float]] = []

        async def watch() -> None:
            async for event in server.videos.events(job.id, OWNER):
                if isinstance(event, Progress) and event.view.eta_seconds is not None:
                    seen.append((event.view.job.progress, event.view.eta_seconds))

        def is_behind() -> bool:
            """Whether the listener has not seen yet how far the job is."""
            assert server.videos._parts is not None
            live = server.videos._parts.claimer.live.get(job.id)
            return live is not None and live.has_started and seen[-1][0] < live.percent

        watching = asyncio.create_task(watch())
        await until(lambda: seen)
        while not watching.done():
            if device.pending and not is_behind():
                device.release_results()
            await asyncio.sleep(0.001)
        await watching
        percents = [percent for percent, _ in seen]
        assert percents == sorted(percents)
        assert len(set(percents)) > 10, "steps and pieces of the decode count"
        assert seen[-1][1] < view.eta_seconds
        assert 200 <= view.poll_after_ms <= 10_000


async def test_a_progress_that_is_not_stored_is_not_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another server, or the next one after a crash, would show an earlier progress."""
    device, stored = held_device(), asyncio.Event()
    note_started = JobStore.note_started

    async def note_later(self: JobStore, job_id: str, fence: int) -> None:
        await stored.wait()
        await note_started(self, job_id, fence)

    monkeypatch.setattr(JobStore, "note_started", note_later)
    monkeypatch.setattr(LeaseKeeper, "note_progress", lambda *arguments: None)
    async with running_server(tmp_path, device) as server:
        job = await server.create()
        parts = server.videos._parts
        assert parts is not None
        await run_until(device, lambda: any(live.percent for live in parts.claimer.live.values()))
        view = await server.view(job.id)
        assert (view.job.status, view.job.progress) == ("queued", 0)
        stored.set()
        await server.until_status(job.id, "in_progress")


async def test_previews_come_while_the_job_runs(tmp_path: Path) -> None:
    device = held_device()
    async with running_server(tmp_path, device) as server:
        job = await server.create(num_previews=2)
        previews: list[PreviewImage] = []

        async def watch() -> None:
            async for event in server.videos.events(job.id, OWNER):
                if isinstance(event, PreviewImage):
                    previews.append(event)

        watching = asyncio.create_task(watch())
        while not watching.done():
            if device.pending:
                device.release_results()
            await asyncio.sleep(0.005)
        await watching
    assert previews
    assert all(preview.pixels.shape == (64, 96, 3) for preview in previews)


async def test_a_failure_is_told_without_internals(tmp_path: Path) -> None:
    def error(request_id: str, phase: str, step: int) -> ItemError | None:
        return ItemError("out of memory on the device", "out_of_memory") if phase == "denoise" and step == 2 else None

    device = FakeExecutor(lambda: FakeRunner(ready=SLOW_DECODE, errors=error))
    async with running_server(tmp_path, device) as server:
        job = await server.ended((await server.create()).id)
        assert (job.status, job.error_code) == ("failed", "generation_failed")
        assert job.error_message == "the device has not enough memory for this request"
        assert server.files() == []
        with pytest.raises(JobNotFoundError, match="failed"):
            await server.videos.content(job.id, OWNER, "video")
        with pytest.raises(InvalidRequestError, match="failed"):
            await server.remix(job.id)


async def test_a_full_disk_fails_one_job_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm_omni.video_jobs.media import MediaStore

    put, full = MediaStore.put, set()

    async def put_or_fail(media: MediaStore, key: str, content: bytes | Path) -> None:
        if key.partition("/")[0] in full and key.endswith(("webp", "jpg")):
            raise MediaStoreFullError("the server's media store is full")
        await put(media, key, content)

    monkeypatch.setattr(MediaStore, "put", put_or_fail)
    device = held_device()
    async with running_server(tmp_path, device) as server:
        one, other = await server.create(), await server.create()
        full.add(one.id)
        device.hold = False
        device.release_results(len(device.pending))
        failed, completed = await server.ended(one.id), await server.ended(other.id)
        assert (failed.status, failed.error_code) == ("failed", "media_store_full")
        assert completed.status == "completed"
        assert server.files() == sorted(completed.outputs.values()), "the part of the failed one is gone"


async def test_a_video_that_cannot_be_encoded_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm_omni.video_jobs.encoding import VideoEncoding

    async def fail(_: VideoEncoding) -> None:
        raise VideoWriteError("The video could not be written: No space left on device.")

    monkeypatch.setattr(VideoEncoding, "finish", fail)
    async with running_server(tmp_path) as server:
        job = await server.ended((await server.create()).id)
        assert (job.status, job.error_code) == ("failed", "video_write_failed")


async def test_a_deleted_job_stops_and_leaves_nothing(tmp_path: Path) -> None:
    device = held_device()
    async with running_server(tmp_path, device) as server:
        job = await server.create(input_files=(b"png",), num_inference_steps=50)
        assert server.files() == [f"{job.id}/inputs/0.png"]
        await server.videos.delete(job.id, OWNER)
        with pytest.raises(JobNotFoundError):
            await server.view(job.id)
        with pytest.raises(JobNotFoundError):
            await server.videos.delete(job.id, OWNER)
        await until(lambda: not server.files())
        other = await server.create(num_inference_steps=50)
        await until(lambda: server.omni.status().num_running)
        await run_until(device, lambda: server.files() or device.num_plans > 4)
        await server.videos.delete(other.id, OWNER)
        await until(lambda: device.aborted)
        device.hold = False
        device.release_results(len(device.pending))
        assert (await server.ended((await server.create()).id)).status == "completed"
        assert {name.partition("/")[0] for name in server.files()} <= {job.id for job in await all_jobs(server)}


async def all_jobs(server: Server) -> list[Any]:
    views, _ = await server.videos.list(OWNER, None, 100, True)
    return [view.job for view in views]


async def test_a_listener_of_a_deleted_job_is_told(tmp_path: Path) -> None:
    async with running_server(tmp_path, held_device()) as server:
        job = await server.create()
        events = server.videos.events(job.id, OWNER)
        await anext(events)
        await server.videos.delete(job.id, OWNER)
        with pytest.raises(JobNotFoundError):
            async for _ in events:
                pass


async def test_jobs_wait_in_the_store_while_the_engines_queue_is_full(tmp_path: Path) -> None:
    device = held_device()
    async with running_server(tmp_path, device, config={"max_num_queued_reqs": 1}) as server:
        picture = server.omni.generate("a picture")
        job = await server.create()
        with pytest.raises(QueueFullError):
            server.omni.generate("another picture")
        await run_until(device, lambda: server.omni.status().num_running == 0)
        await picture.aclose()
        device.hold = False
        device.release_results(len(device.pending))
        ended = await server.ended(job.id)
        assert (ended.status, ended.num_attempts) == ("completed", 1), "a full queue is no attempt"


async def test_a_page_of_waiting_jobs_asks_once_for_all_estimates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    queued_before = JobStore.queued_before
    asked: list[list[str]] = []

    async def note(store: JobStore, job_ids: Sequence[str]) -> dict[str, tuple[int, float]]:
        asked.append(list(job_ids))
        return await queued_before(store, job_ids)

    device = held_device()
    async with running_server(tmp_path, device, config={"max_num_seqs": 1}) as server:
        for _ in range(6):
            await server.create()
        await run_until(device, lambda: device.num_plans >= 1)
        monkeypatch.setattr(JobStore, "queued_before", note)
        views, _ = await server.videos.list(OWNER, None, 100, False)
        etas = [view.eta_seconds or 0.0 for view in views if view.job.id in asked[0]]
        assert (len(asked), len(etas) >= 3) == (1, True)
        assert etas == sorted({*etas}), "each waits for those before it"


async def test_a_worker_death_does_not_end_a_job(tmp_path: Path) -> None:
    device = FakeExecutor(lambda: FakeRunner(ready=SLOW_DECODE), die_at={4})
    async with running_server(tmp_path, device) as server:
        job = await server.ended((await server.create()).id)
        assert (job.status, job.num_attempts, device.num_starts) == ("completed", 1, 2)


async def test_a_remix_has_the_seed_and_the_size_of_its_source(tmp_path: Path) -> None:
    async with running_server(tmp_path) as server:
        source = await server.ended((await server.create(num_frames=9, seed=11)).id)
        remix = await server.ended((await server.remix(source.id)).id)
        assert (remix.status, remix.remixed_from, remix.request["prompt"]) == ("completed", source.id, "a bear")
        assert remix.shown == source.shown
        with pytest.raises(JobNotFoundError):
            await server.remix(source.id, "another owner")


async def test_a_job_whose_pictures_cannot_be_stored_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm_omni.video_jobs.media import MediaStore

    async def fail(media: MediaStore, key: str, content: bytes) -> None:
        raise MediaStoreFullError("the server's media store is full")

    async with running_server(tmp_path) as server:
        monkeypatch.setattr(MediaStore, "put", fail)
        with pytest.raises(MediaStoreFullError):
            await server.create(input_files=(b"png",))
        assert await all_jobs(server) == []
        assert server.device.num_plans == 0


async def test_a_key_has_a_limited_number_of_unfinished_jobs(tmp_path: Path) -> None:
    async with running_server(tmp_path, held_device(), max_jobs_per_key=1) as server:
        await server.create()
        with pytest.raises(TooManyJobsError):
            await server.create()
        await server.create(owner="another")


async def test_a_video_is_made_without_a_job(tmp_path: Path) -> None:
    async with running_server(tmp_path) as server:
        steps: list[int] = []
        new = server.new_video(output_format="gif")
        async with server.videos.make_now(new, lambda output: steps.append(output.step)) as encoded:
            assert encoded.content_type == "image/gif"
            assert encoded.video.stat().st_size > 0
        assert not encoded.video.exists()
        assert steps[-1] == 4
        assert await all_jobs(server) == []


async def test_a_caller_that_leaves_stops_its_video(tmp_path: Path) -> None:
    device = held_device()
    async with running_server(tmp_path, device) as server:

        async def make() -> None:
            async with server.videos.make_now(server.new_video()):
                raise AssertionError("it never ends")

        making = asyncio.create_task(make())
        await run_until(device, lambda: server.omni.status().num_running)
        making.cancel()
        with pytest.raises(asyncio.CancelledError):
            await making
        assert server.omni.status().num_running == 0


async def test_observers_learn_of_jobs_and_encodings(tmp_path: Path) -> None:
    class Recorder(VideoObserver):
        counts: dict[str, int] = {}  # noqa: RUF012 (replaced)
        num_encoded = 0

        def on_job_counts(self, counts: Any) -> None:
            self.counts = dict(counts)

        def on_video_encoded(self, seconds: float) -> None:
            assert seconds > 0
            self.num_encoded += 1

    recorder = Recorder()
    async with running_server(tmp_path, observer=recorder) as server:
        await server.ended((await server.create()).id)
        await until(lambda: recorder.counts.get("completed") == 1)
    assert recorder.num_encoded == 1
