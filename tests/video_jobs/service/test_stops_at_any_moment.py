"""Deletes and drains that come while the end of a job is on its way to the stores."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from testbed.fakes import FakeExecutor, FakeRunner
from testbed.patience import GUARD_SECONDS, until
from tests.video_jobs.service.servers import OWNER, SLOW_DECODE, Server, running_server, until_next_turn
from vllm_omni.diffusion.messages.plan import ItemError
from vllm_omni.video_jobs import parts as parts_module
from vllm_omni.video_jobs.media import MediaStore
from vllm_omni.video_jobs.parts import ServiceParts
from vllm_omni.video_jobs.store.job_store import JobStore

SHORT_LEASE = 0.06


def parts_of(server: Server) -> ServiceParts:
    parts = server.videos._parts
    assert parts is not None
    return parts


class SlowUploads:
    """Uploads of files whose key has `name` in it stay in their threads until `go_on` is set."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
        self.begun, self.go_on = threading.Event(), threading.Event()
        put = MediaStore._put

        def slow_put(media: MediaStore, path: str, content: Any) -> None:
            if name in path:
                content = content if isinstance(content, bytes) else content.read_bytes()
                self.begun.set()
                assert self.go_on.wait(GUARD_SECONDS)
            put(media, path, content)

        monkeypatch.setattr(MediaStore, "_put", slow_put)


def count_renewals(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """Number of renewals so far that have reported a lost job."""
    renew = JobStore.renew
    reports: list[str] = []

    async def counted(store: JobStore, *args: Any) -> set[str]:
        gone = await renew(store, *args)
        reports.extend(gone)
        return gone

    monkeypatch.setattr(JobStore, "renew", counted)
    return lambda: len(reports)


def failing_device() -> FakeExecutor:
    def error(request_id: str, phase: str, step: int) -> ItemError | None:
        return ItemError("a bad request", "invalid") if phase == "denoise" else None

    return FakeExecutor(lambda: FakeRunner(ready=SLOW_DECODE, errors=error))


async def test_a_job_deleted_during_its_upload_is_removed_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uploads, num_reports = SlowUploads(monkeypatch, "video.mp4"), count_renewals(monkeypatch)
    async with running_server(tmp_path, lease_seconds=SHORT_LEASE) as server:
        store = parts_of(server).store
        job = await server.create()
        await until(uploads.begun.is_set)
        await server.videos.delete(job.id, OWNER)
        await until(lambda: num_reports() >= 3)  # each renewal reports the job again
        for _ in range(4):
            await until_next_turn()
        assert job.id in parts_of(server).claimer.live, "it waits for its thread"
        uploads.go_on.set()
        await until(lambda: not parts_of(server).claimer.live)
        while await store.unfinished_deletes():
            await until_next_turn()
        assert server.files() == []


def hold_failures(monkeypatch: pytest.MonkeyPatch) -> tuple[asyncio.Event, asyncio.Event]:
    """Let the store wait before it notes a failure. Returns (event of its arrival, event that ends the wait)."""
    fail, failing, may_go_on = JobStore.fail, asyncio.Event(), asyncio.Event()

    async def slow_fail(store: JobStore, *args: Any) -> None:
        failing.set()
        await may_go_on.wait()
        await fail(store, *args)

    monkeypatch.setattr(JobStore, "fail", slow_fail)
    return failing, may_go_on


async def test_a_job_deleted_while_its_failure_is_stored_is_removed_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing, may_go_on = hold_failures(monkeypatch)
    async with running_server(tmp_path, failing_device()) as server:  # a lease of GUARD_SECONDS
        job = await server.create()
        await failing.wait()
        await server.videos.delete(job.id, OWNER)
        may_go_on.set()
        while await parts_of(server).store.unfinished_deletes():
            await until_next_turn()


async def test_a_drain_does_not_lose_a_failure_that_is_being_stored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing, may_go_on = hold_failures(monkeypatch)
    async with running_server(tmp_path, failing_device()) as server:
        job = await server.create()
        await failing.wait()
        draining = asyncio.create_task(server.videos.drain(0.0))
        for _ in range(4):
            await until_next_turn()
        may_go_on.set()
        await draining
        assert (await server.view(job.id)).job.status == "failed"


async def test_a_drain_does_not_wait_for_a_store_that_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts_module, "GIVE_BACK_SECONDS", 0.02)
    monkeypatch.setattr(parts_module, "CLOSE_SECONDS", 0.02)
    uploads = SlowUploads(monkeypatch, "video.mp4")
    async with running_server(tmp_path) as server:
        job = await server.create()
        await until(uploads.begun.is_set)
        live = parts_of(server).claimer.live[job.id]
        await server.videos.drain(0.02)
        await server.videos.close()
        assert live.task is not None
        assert not live.task.done()
        assert not uploads.go_on.is_set()
        uploads.go_on.set()
        await asyncio.wait([live.task])


async def test_a_job_deleted_while_its_last_checkpoint_is_stored_leaves_no_scratch_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uploads = SlowUploads(monkeypatch, "checkpoint")
    async with running_server(tmp_path, checkpoint_seconds=1e-9) as server:
        scratch = parts_of(server)._scratch.path
        job = await server.create()
        await until(uploads.begun.is_set)
        await until(lambda: list(scratch.rglob("spritesheet.jpg")))
        for _ in range(4):
            await until_next_turn()
        await server.videos.delete(job.id, OWNER)
        uploads.go_on.set()
        await until(lambda: not parts_of(server).claimer.live)
        assert os.listdir(scratch) == []


async def test_a_completed_job_is_not_reported_as_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    complete, num_reports = JobStore.complete, count_renewals(monkeypatch)

    async def complete_slowly(store: JobStore, *args: Any) -> None:
        await complete(store, *args)
        await until(lambda: num_reports() >= 2)  # the row has ended, and the lease is still renewed
        await until_next_turn()

    monkeypatch.setattr(JobStore, "complete", complete_slowly)
    caplog.set_level("INFO")
    async with running_server(tmp_path, lease_seconds=SHORT_LEASE) as server:
        job = await server.ended((await server.create()).id)
        await until(lambda: not parts_of(server).claimer.live)
    assert f"video job {job.id} completed" in caplog.text
    assert "stops here" not in caplog.text
