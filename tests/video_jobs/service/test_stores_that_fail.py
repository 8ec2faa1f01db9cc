"""Stores that are away, answer too late, or hold broken checkpoints."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from testbed.fakes import FakeExecutor, FakeRunner
from testbed.patience import until
from tests.video_jobs.service.servers import NUM_STEPS, OWNER, SLOW_DECODE, running_server
from tests.video_jobs.service.test_life_of_a_job import all_jobs, held_device, run_until
from tests.video_jobs.service.test_two_servers import num_steps_run
from tests.video_jobs.test_checkpoint_file import DEEP
from vllm_omni.diffusion.messages.checkpoint import Checkpoint
from vllm_omni.errors import UnavailableError
from vllm_omni.video_jobs import claimer, runner
from vllm_omni.video_jobs.checkpoint_file import from_bytes
from vllm_omni.video_jobs.draining import Drain
from vllm_omni.video_jobs.media import MediaStore, MediaStoreError
from vllm_omni.video_jobs.records import VideoJob
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


async def drained_job(folder: Path) -> VideoJob:
    """Job of a server that has stopped; it has a checkpoint."""
    device = held_device()
    async with running_server(folder, device) as server:
        job = await server.create()
        await run_until(device, lambda: device.num_plans >= 3)
        draining = asyncio.create_task(server.videos.drain(30.0))
        await run_until(device, draining.done)
        return (await server.view(job.id)).job


HOSTILE = {"missing": None, "broken": b"broken", "deep": DEEP, "large": bytes(4_000_000)}


@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE)
async def test_a_job_whose_checkpoint_is_lost_begins_from_the_start(
    tmp_path: Path, content: bytes | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = await drained_job(tmp_path)
    assert job.checkpoint is not None
    file = tmp_path / "media" / job.checkpoint
    file.unlink() if content is None else file.write_bytes(content)
    read: list[bytes] = []

    def note_read(data: bytes, key: str) -> Checkpoint:
        read.append(data)
        return from_bytes(data, key)

    monkeypatch.setattr(runner, "from_bytes", note_read)
    async with running_server(tmp_path) as server:
        ended = await server.ended(job.id)
        assert ended.status == "completed"
        assert num_steps_run(server.device) == NUM_STEPS
        await until(lambda: server.files() == sorted(ended.outputs.values()))
    assert len(read) == (content in (HOSTILE["broken"], HOSTILE["deep"])), "a large one is not even loaded"


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a server repeat calls of the media store only once, and claim soon after."""
    for name in ("READ_SECONDS", "WRITE_SECONDS", "MEDIA_PAUSE_SECONDS"):
        monkeypatch.setattr(runner, name, 0.0)
    monkeypatch.setattr(claimer, "REFUSED_SECONDS", 0.0)


async def test_a_checkpoint_waits_until_its_store_answers(
    tmp_path: Path, impatient: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = await drained_job(tmp_path)
    get, num_failures = MediaStore.get, 0

    async def fail_thrice(media: MediaStore, key: str, *limit: int) -> bytes:
        nonlocal num_failures
        if num_failures < 3:
            num_failures += 1
            raise MediaStoreError("away")
        return await get(media, key, *limit)

    monkeypatch.setattr(MediaStore, "get", fail_thrice)
    async with running_server(tmp_path) as server:
        ended = await server.ended(job.id)
        assert (ended.status, ended.num_attempts) == ("completed", 1), "an outage is no attempt"
        assert num_failures == 3
        assert num_steps_run(server.device) < NUM_STEPS


async def test_an_outage_of_the_media_store_fails_no_made_video(
    tmp_path: Path, impatient: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    put, num_failures = MediaStore.put, 0

    async def fail_thrice(media: MediaStore, key: str, content: Any) -> None:
        nonlocal num_failures
        if num_failures < 3:
            num_failures += 1
            raise MediaStoreError("away")
        await put(media, key, content)

    monkeypatch.setattr(MediaStore, "put", fail_thrice)
    async with running_server(tmp_path) as server:
        ended = await server.ended((await server.create()).id)
        assert (ended.status, ended.num_attempts) == ("completed", 1)
        assert server.files() == sorted(ended.outputs.values())


async def test_an_input_that_is_too_large_fails_its_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "_MAX_INPUT_BYTES", 2)
    async with running_server(tmp_path) as server:
        ended = await server.ended((await server.create(input_files=(b"png",))).id)
        assert (ended.status, ended.error_code) == ("failed", "media_too_large")


async def test_jobs_that_a_server_cannot_run_are_left_to_others(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """They came from a newer server."""
    faults = {
        "json_set(request, '$.params.sharpness', 1)": "sharpness",
        "json_remove(request, '$.params')": "the stored request cannot be read: Object missing required field `params`",
        "json_set(request, '$.params.lora_request', json('[{}]'))": "missing required field `name`",
        "json_set(request, '$.prompt', 3)": "Expected `str`, got `int` - at `$.prompt`",
    }
    async with running_server(tmp_path, FakeExecutor(hold=True)) as server:
        await server.videos.drain(0.0)
        server.videos._drain = Drain()
        newer = {fault: (await server.create()).id for fault in faults}
    with sqlite3.connect(tmp_path / "jobs.sqlite") as database:
        for fault, job_id in newer.items():
            database.execute(f"UPDATE video_jobs SET request = {fault} WHERE id = ?", (job_id,))
    database.close()
    async with running_server(tmp_path) as older:
        assert (await older.ended((await older.create()).id)).status == "completed"
        await until(lambda: caplog.text.count("is left to other servers") == len(faults))
        for fault, job_id in newer.items():
            (line,) = (line for line in caplog.messages if job_id in line and "is left to other servers" in line)
            assert line.startswith(f"video job {job_id} is left to other servers: this one cannot run it: ")
            assert faults[fault] in line
            job = await older.videos._running_parts().store.get(job_id, OWNER)
            assert (job.status, job.num_attempts) == ("queued", 0)
            with sqlite3.connect(tmp_path / "jobs.sqlite") as database:
                (fence,) = database.execute("SELECT fence FROM video_jobs WHERE id = ?", (job_id,)).fetchone()
            database.close()
            assert fence == 2, "claimed and given back once"


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
