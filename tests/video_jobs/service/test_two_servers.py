"""Servers that share their stores, drains and restarts: each job is completed once, with the same frames."""

from __future__ import annotations

import asyncio
import logging
import sqlite3
import time
from pathlib import Path
from typing import Any

import pytest

from testbed.fakes import FakeExecutor, FakeRunner, as_whole, fake_video
from testbed.patience import until
from tests.diffusion.control.builders import VIDEO
from tests.diffusion.control.engines import NotedEvents
from tests.video_jobs.service.servers import NUM_STEPS, OWNER, SLOW_DECODE, Server, running_server, until_next_turn
from tests.video_jobs.service.test_life_of_a_job import all_jobs, held_device, run_until
from vllm_omni.diffusion.catalog.whole_info import WholePipeline
from vllm_omni.diffusion.control.plans_in_flight import MAX_PLANS_IN_FLIGHT
from vllm_omni.errors import UnavailableError
from vllm_omni.video_jobs.encoding import EncodedVideo, VideoEncoding
from vllm_omni.video_jobs.parts import ENCODINGS_PER_THREAD
from vllm_omni.video_jobs.records import VideoJob
from vllm_omni.video_jobs.store.job_store import JobStore

SHORT_LEASE = 0.3
MANY_STEPS = 20


async def video_of(server: Server, job: VideoJob) -> bytes:
    content = await server.videos.content(job.id, OWNER, "video")
    return b"".join([piece async for piece in content.read()])


async def calm_video(folder: Path) -> bytes:
    """Video file of a job that nothing interrupts."""
    async with running_server(folder) as server:
        return await video_of(server, await server.ended((await server.create()).id))


def num_steps_run(device: FakeExecutor) -> int:
    """Denoising steps that the runner of a device has run."""
    return sum(len(plan.denoise) for plan in device.runner.plans)


async def test_a_drained_job_goes_on_elsewhere_from_its_newest_step(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    device, observer = held_device(), NotedEvents()
    async with running_server(tmp_path / "shared", device, config={"observer": observer}) as first:
        job = await first.create(num_inference_steps=MANY_STEPS)
        await run_until(device, lambda: device.num_plans >= 3)
        draining = asyncio.create_task(first.videos.drain(30.0))
        await run_until(device, draining.done)
        steps_of_first = num_steps_run(device)
        assert 0 < steps_of_first < MANY_STEPS
        waiting = (await first.view(job.id)).job
        assert waiting.checkpoint is not None
        step = waiting.checkpoint.rpartition("-")[2].removesuffix(".safetensors")
        assert f"video job {job.id}: stored after step {step}, given back" in caplog.text
        assert [outcome for _, outcome in observer.outcomes] == ["given back"]
        assert [name for name in first.files() if "checkpoint" in name] == [waiting.checkpoint]
        async with running_server(tmp_path / "shared") as second:
            ended = await second.ended(job.id)
            assert (ended.status, ended.num_attempts) == ("completed", 1), "a drain is no attempt"
            num_repeated = num_steps_run(second.device) - (MANY_STEPS - steps_of_first)
            # Plans that were in flight when the checkpoint came, and one that was sent before the abort.
            assert 0 <= num_repeated <= MAX_PLANS_IN_FLIGHT + 1
            assert await video_of(second, ended) == await calm_video(tmp_path / "calm")
            await until(lambda: second.files() == sorted(ended.outputs.values()))  # without the checkpoint


async def test_a_drain_completes_a_job_whose_frames_are_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm_omni.video_jobs.media import MediaStore

    put, writing, may_write = MediaStore.put, asyncio.Event(), asyncio.Event()

    async def slow_put(media: MediaStore, key: str, content: Any) -> None:
        writing.set()
        await may_write.wait()
        await put(media, key, content)

    monkeypatch.setattr(MediaStore, "put", slow_put)
    async with running_server(tmp_path) as server:
        job = await server.create()
        await writing.wait()
        draining = asyncio.create_task(server.videos.drain(30.0))
        await asyncio.sleep(0)
        may_write.set()
        await draining
        assert (await server.view(job.id)).job.status == "completed"


async def test_a_drain_that_comes_while_a_job_is_completed_keeps_its_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    complete, completing, may_go_on = JobStore.complete, asyncio.Event(), asyncio.Event()

    async def slow_complete(store: JobStore, *args: Any) -> None:
        await complete(store, *args)
        completing.set()
        await may_go_on.wait()

    monkeypatch.setattr(JobStore, "complete", slow_complete)
    async with running_server(tmp_path) as server:
        job = await server.create()
        await completing.wait()
        draining = asyncio.create_task(server.videos.drain(0.0))
        await asyncio.sleep(0.02)
        may_go_on.set()
        await draining
        ended = (await server.view(job.id)).job
        assert ended.status == "completed"
        assert server.files() == sorted(ended.outputs.values())


async def test_a_drain_ends_in_time_and_gives_back_what_waits(tmp_path: Path) -> None:
    device, observer = held_device(), NotedEvents()
    async with running_server(tmp_path / "shared", device, config={"observer": observer}) as first:
        jobs = [await first.create(), await first.create()]
        await until(lambda: device.pending)
        await first.videos.drain(0.01)  # the device does not answer
        assert {outcome for _, outcome in observer.outcomes} == {"given back"}
        async with running_server(tmp_path / "shared") as second:
            for job in jobs:
                assert (await second.ended(job.id)).status == "completed"


async def test_a_silent_servers_job_is_completed_by_another_one_and_its_late_writes_are_refused(tmp_path: Path) -> None:
    device = held_device()
    async with running_server(tmp_path / "shared", device, lease_seconds=SHORT_LEASE) as first:
        parts = first.videos._parts
        assert parts is not None
        job = await first.create()
        await run_until(device, lambda: device.num_plans >= 3)
        await parts.leases.close()  # it is alive, but silent
        parts._claiming.cancel()
        async with running_server(tmp_path / "shared") as second:
            ended = await second.ended(job.id)
            assert ended.status == "completed"
            files = second.files()
            device.hold = False
            device.release_results(len(device.pending))
            await until(lambda: not parts.claimer.live)
            assert (await second.view(job.id)).job == ended
            assert second.files() == files == sorted(ended.outputs.values()), "the late files are gone"
            assert await video_of(second, ended) == await calm_video(tmp_path / "calm")


async def test_a_server_does_not_claim_the_job_that_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its lease has ended, because its server or the database was away for a while."""
    renew, claim, is_away, num_claims = JobStore.renew, JobStore.claim, True, 0

    async def renew_later(store: JobStore, *args: Any) -> set[str]:
        if is_away:
            raise UnavailableError("away")
        return await renew(store, *args)

    async def count_claims(store: JobStore, *args: Any) -> Any:
        nonlocal num_claims
        claimed = await claim(store, *args)
        num_claims += 1
        return claimed

    monkeypatch.setattr(JobStore, "renew", renew_later)
    monkeypatch.setattr(JobStore, "claim", count_claims)
    device = held_device()
    async with running_server(tmp_path, device, lease_seconds=SHORT_LEASE) as server:
        job = await server.create()
        await run_until(device, lambda: device.num_plans >= 2)
        parts = server.videos._parts
        assert parts is not None
        first = parts.claimer.live[job.id]
        with sqlite3.connect(tmp_path / "jobs.sqlite") as database:
            (lease_end,) = database.execute("SELECT lease_ends_at FROM video_jobs").fetchone()
        database.close()
        await until(lambda: time.time() > lease_end)
        num_claims = 0
        await until(lambda: num_claims >= 2)
        assert parts.claimer.live == {job.id: first}
        is_away = False
        await run_until(device, lambda: not parts.claimer.live)
        ended = (await server.view(job.id)).job
        assert (ended.status, ended.num_attempts) == ("completed", 1)


async def test_a_lost_job_stops_at_the_next_renewal(tmp_path: Path) -> None:
    device = held_device()
    async with running_server(tmp_path / "shared", device, lease_seconds=SHORT_LEASE) as first:
        job = await first.create(num_inference_steps=50)
        await run_until(device, lambda: device.num_plans >= 3)
        async with running_server(tmp_path / "shared", held_device()) as second:
            await second.videos.delete(job.id, OWNER)  # on a server that does not run it
            await until(lambda: device.aborted)
            await until(lambda: not second.files())
            assert await all_jobs(second) == []


async def test_another_server_shows_the_progress_of_a_job(tmp_path: Path) -> None:
    device = held_device()
    async with (
        running_server(tmp_path, device, lease_seconds=SHORT_LEASE) as first,
        running_server(tmp_path, FakeExecutor(hold=True), lease_seconds=SHORT_LEASE) as second,
    ):
        second_parts = second.videos._parts
        assert second_parts is not None
        second_parts.claimer.pause(30.0)
        await asyncio.sleep(0)
        job = await first.create(num_inference_steps=50)
        await run_until(device, lambda: device.num_plans >= 20)
        async for event in second.videos.events(job.id, OWNER):
            if event.view.job.progress > 0:
                assert event.view.job.status == "in_progress"
                assert event.view.eta_seconds is not None
                break


async def test_a_server_claims_no_job_that_it_cannot_begin(tmp_path: Path) -> None:
    device = held_device()
    async with running_server(tmp_path, device) as server:
        jobs = [await server.create(height=128, width=128) for _ in range(5)]
        await run_until(device, lambda: num_steps_run(device) > 2)
        parts = server.videos._parts
        assert parts is not None
        for _ in range(20):
            await until_next_turn()
            assert len(parts.claimer.live) == 1, "it fills a step alone"
        before = await parts.store.queued_before([jobs[-1].id])
        num_before, seconds = before[jobs[-1].id]
        assert num_before == len(jobs) - 1 - len(parts.claimer.live)
        assert ((await server.view(jobs[-1].id)).eta_seconds or 0) > seconds
        device.hold = False
        device.release_results(len(device.pending))
        for job in jobs:
            assert (await server.ended(job.id)).status == "completed"


async def test_jobs_are_run_by_priority_and_age(tmp_path: Path) -> None:
    order: list[str] = []

    class NotingRunner(FakeRunner):
        def execute(self, plan: Any) -> Any:
            order.extend(request.prompt for request in plan.new_requests)
            return super().execute(plan)

    device = FakeExecutor(lambda: NotingRunner(ready=SLOW_DECODE), hold=True)
    async with running_server(tmp_path, device, config={"max_num_seqs": 1, "scheduling_policy": "fcfs"}) as server:
        jobs = [await server.create("first")]
        await until(lambda: device.pending)
        jobs += [
            await server.create(name, priority=priority)
            for name, priority in (("later", 0), ("last", 1), ("urgent", -1))
        ]
        device.hold = False
        device.release_results(len(device.pending))
        for job in jobs:
            await server.ended(job.id)
    assert order == ["first", "urgent", "later", "last"]


async def test_a_restarted_server_goes_on_with_its_jobs(tmp_path: Path) -> None:
    device = held_device()
    async with running_server(tmp_path, device) as server:
        running, queued = await server.create(), await server.create()
        await run_until(device, lambda: device.num_plans >= 3)
        closing = asyncio.create_task(server.videos.close())
        await run_until(device, closing.done)
    async with running_server(tmp_path) as server:
        for job in (running, queued):
            assert (await server.ended(job.id)).status == "completed"


async def test_an_engine_that_stops_gives_its_jobs_back(tmp_path: Path) -> None:
    device = held_device()
    async with running_server(tmp_path / "shared", device) as first:
        job = await first.create()
        await run_until(device, lambda: device.num_plans >= 2)
        await first.omni.close()
        async with running_server(tmp_path / "shared") as second:
            ended = await second.ended(job.id)
            assert (ended.status, ended.num_attempts) == ("completed", 1)


async def test_no_further_job_is_claimed_while_many_videos_wait_for_an_encoder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finish, may_finish = VideoEncoding.finish, asyncio.Event()

    async def slow_finish(encoding: VideoEncoding) -> EncodedVideo:
        await may_finish.wait()
        return await finish(encoding)

    monkeypatch.setattr(VideoEncoding, "finish", slow_finish)
    async with running_server(tmp_path, num_encoding_threads=1) as server:
        jobs = [await server.create() for _ in range(6)]
        parts = server.videos._parts
        assert parts is not None
        most = ENCODINGS_PER_THREAD + 1  # one was claimed while the last of them was made
        await until(lambda: sum(live.is_made for live in parts.claimer.live.values()) >= ENCODINGS_PER_THREAD)
        for _ in range(20):
            await until_next_turn()
            assert len(parts.claimer.live) <= most
        may_finish.set()
        for job in jobs:
            assert (await server.ended(job.id)).status == "completed"


async def test_a_drained_job_of_a_whole_pipeline_begins_from_the_start(tmp_path: Path) -> None:
    pipeline = WholePipeline("SomePipeline", ("height", "width", "num_inference_steps", "num_frames"), "callback", 1)
    info = as_whole(VIDEO, pipeline)

    def make_device() -> FakeExecutor:
        return FakeExecutor(lambda: FakeRunner(image=lambda request, step: fake_video(request)), hold=True)

    device = make_device()
    async with running_server(tmp_path, device, info=info) as first:
        job = await first.create()
        await run_until(device, lambda: device.num_plans >= 3)
        draining = asyncio.create_task(first.videos.drain(30.0))
        await run_until(device, draining.done)
        assert (await first.view(job.id)).job.checkpoint is None
    device = make_device()
    device.hold = False
    async with running_server(tmp_path, device, info=info) as second:
        ended = await second.ended(job.id)
        assert (ended.status, ended.num_attempts) == ("completed", 1)
        assert num_steps_run(device) == NUM_STEPS
