"""Stores that are away, answer too late, or hold broken checkpoints."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from testbed.fakes import FakeExecutor, FakeRunner
from testbed.patience import until
from tests.video_jobs.service.servers import NUM_STEPS, OWNER, SLOW_DECODE, running_server
from tests.video_jobs.service.test_life_of_a_job import all_jobs, held_device, run_until
from tests.video_jobs.service.test_two_servers import num_steps_run
from vllm_omni.errors import UnavailableError
from vllm_omni.video_jobs.media import MediaStore, MediaStoreError
from vllm_omni.video_jobs.store.job_store import JobStore


async def test_a_store_that_is_away_for_a_moment_fails_no_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    complete, started, put = JobStore.complete, JobStore.note_started, MediaStore.put
    failures = {"complete": 2, "note_started": 1, "put": 1}

    def fails(name: str) -> bool:
        failures[name] -= 1
        return failures[name] >= 0

    async def complete_later(store: JobStore, *args: Any) -> None:
        if fails("complete"):
            raise UnavailableError("away")
        await complete(store, *args)

    async def start_later(store: JobStore, *args: Any) -> None:
        if fails("note_started"):
            raise UnavailableError("away")
        await started(store, *args)

    async def put_later(media: MediaStore, key: str, content: Any) -> None:
        if fails("put"):
            raise MediaStoreError("away")
        await put(media, key, content)

    monkeypatch.setattr(JobStore, "complete", complete_later)
    monkeypatch.setattr(JobStore, "note_started", start_later)
    monkeypatch.setattr(MediaStore, "put", put_later)
    async with running_server(tmp_path) as server:
        job = await server.ended((await server.create()).id)
        assert (job.status, job.num_attempts) == ("completed", 1)
        assert job.started_at is not None
    assert max(failures.values()) < 0


async def test_a_commit_whose_answer_was_lost_keeps_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    complete = JobStore.complete
    calls: list[Mapping[str, str]] = []

    async def complete_and_lose_the_answer(
        store: JobStore, job_id: str, fence: int, outputs: Mapping[str, str]
    ) -> None:
        calls.append(outputs)
        await complete(store, job_id, fence, outputs)
        raise UnavailableError("the connection was lost")

    monkeypatch.setattr(JobStore, "complete", complete_and_lose_the_answer)
    async with running_server(tmp_path) as server:
        job = await server.ended((await server.create()).id)
        parts = server.videos._parts
        assert parts is not None
        await until(lambda: not parts.claimer.live)
        assert len(calls) == 2
        assert server.files() == sorted(job.outputs.values())


@pytest.mark.parametrize("content", [None, b"broken"], ids=["missing", "broken"])
async def test_a_job_whose_checkpoint_is_lost_begins_from_the_start(tmp_path: Path, content: bytes | None) -> None:
    device = held_device()
    async with running_server(tmp_path, device) as server:
        job = await server.create()
        await run_until(device, lambda: device.num_plans >= 3)
        draining = asyncio.create_task(server.videos.drain(30.0))
        await run_until(device, draining.done)
        checkpoint = (await server.view(job.id)).job.checkpoint
        assert checkpoint is not None
        file = server.media / checkpoint
        file.unlink() if content is None else file.write_bytes(content)
    async with running_server(tmp_path) as server:
        ended = await server.ended(job.id)
        assert ended.status == "completed"
        assert num_steps_run(server.device) == NUM_STEPS
        await until(lambda: server.files() == sorted(ended.outputs.values()))


async def test_an_engine_that_gives_up_counts_as_an_attempt(tmp_path: Path) -> None:
    """The job may be the reason for the deaths, so the next server must not begin as if nothing had happened."""
    deadly = FakeExecutor(lambda: FakeRunner(ready=SLOW_DECODE), die_at=range(100))
    async with running_server(tmp_path, deadly, lease_seconds=0.2, config={"max_worker_restarts": 0}) as first:
        job = await first.create()
        await until(lambda: first.omni.status().state == "failed")
        async with running_server(tmp_path) as second:
            ended = await second.ended(job.id)
            assert (ended.status, ended.num_attempts) == ("completed", 2)


async def test_ended_jobs_expire_with_their_files(tmp_path: Path) -> None:
    async with running_server(tmp_path, job_ttl_seconds=1.0) as server:
        job = await server.create()
        outputs = set()
        while await all_jobs(server):
            outputs |= set(server.files())
        await until(lambda: not server.files())
        assert any(name.endswith("video.mp4") for name in outputs), f"{job.id} was completed before"


async def test_a_delete_that_was_cut_off_is_finished_by_a_sweep(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    delete_tree, is_away = MediaStore.delete_tree, True

    async def fail(media: MediaStore, prefix: str) -> None:
        if is_away:
            raise MediaStoreError("away")
        await delete_tree(media, prefix)

    monkeypatch.setattr(MediaStore, "delete_tree", fail)
    async with running_server(tmp_path) as server:
        job = await server.ended((await server.create()).id)
        await server.videos.delete(job.id, OWNER)
        assert await all_jobs(server) == []
        assert server.files()
        is_away = False
        await until(lambda: not server.files())
