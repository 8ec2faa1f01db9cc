"""Creation of jobs that fails, takes too long or is cancelled: nothing is left, and the client is told why."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from testbed.patience import until
from tests.video_jobs.service.servers import OWNER, Server, running_server
from tests.video_jobs.service.test_life_of_a_job import all_jobs
from vllm_omni.errors import JobNotFoundError, StoreFullError, TooManyJobsError, UnavailableError
from vllm_omni.video_jobs.media import MediaStore, MediaStoreFullError
from vllm_omni.video_jobs.observer import VideoObserver
from vllm_omni.video_jobs.store import lifetimes


class Refusals(VideoObserver):
    """Reasons of jobs that were not made."""

    def __init__(self) -> None:
        self.reasons: list[str] = []

    def on_job_refused(self, reason: str) -> None:
        self.reasons.append(reason)


def num_rows(folder: Path) -> int:
    with closing(sqlite3.connect(folder / "jobs.sqlite")) as connection:
        number: int = connection.execute("SELECT count(*) FROM video_jobs").fetchone()[0]
    return number


async def create(server: Server) -> None:
    await server.create(input_files=(b"png",))


async def keep(server: Server) -> None:
    """Keep a video that was made without a job."""
    new = server.new_video()
    job = server.omni.make_checked_job(new.checked)
    async with server.videos.make_now(new, job=job) as encoded:
        await server.videos.keep(new, job, encoded)


@pytest.mark.parametrize("make", [create, keep])
async def test_files_that_come_after_a_sweep_are_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Callable[[Server], Any]
) -> None:
    put, written = MediaStore.put, []

    async def put_after_sweep(media: MediaStore, key: str, content: bytes | Path) -> None:
        await until(lambda: num_rows(tmp_path) == 0)
        await put(media, key, content)
        written.append(key)

    monkeypatch.setattr(lifetimes, "CREATION_SECONDS", 0.0)
    monkeypatch.setattr(MediaStore, "put", put_after_sweep)
    async with running_server(tmp_path) as server:
        with pytest.raises(UnavailableError, match="not made: its files were not stored within") as refused:
            await make(server)
        assert (refused.value.status, refused.value.retryable) == (503, True)
        assert written
        await until(lambda: num_rows(tmp_path) == 0)
        assert server.files() == []


async def test_a_creation_that_is_cancelled_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put, has_written = MediaStore.put, asyncio.Event()

    async def put_for_ever(media: MediaStore, key: str, content: bytes | Path) -> None:
        await put(media, key, content)
        has_written.set()
        await asyncio.Event().wait()

    monkeypatch.setattr(MediaStore, "put", put_for_ever)
    async with running_server(tmp_path) as server:
        creating = asyncio.create_task(create(server))
        await has_written.wait()
        creating.cancel()
        with pytest.raises(asyncio.CancelledError):
            await creating
        assert num_rows(tmp_path) == 0
        assert server.files() == []


async def test_a_remix_of_a_job_that_is_deleted_meanwhile_is_not_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    get = MediaStore.get

    async def get_after_delete(media: MediaStore, key: str) -> bytes:
        await server.videos.delete(source.id, OWNER)
        return await get(media, key)

    async with running_server(tmp_path) as server:
        new = server.new_video()
        job = server.omni.make_checked_job(new.checked)
        async with server.videos.make_now(new, job=job) as encoded:
            source = await server.videos.keep(server.new_video(input_files=(b"png",)), job, encoded)
        monkeypatch.setattr(MediaStore, "get", get_after_delete)
        with pytest.raises(JobNotFoundError, match=source.id):
            await server.videos.remix(source.id, OWNER, "a bear", lambda num_bytes: None)
        assert await all_jobs(server) == []


@pytest.mark.parametrize(
    ("limits", "error", "reason"),
    [
        ({"max_jobs_per_key": 1}, TooManyJobsError, "too_many_jobs"),
        ({"max_jobs": 1}, StoreFullError, "store_full"),
        ({}, MediaStoreFullError, "store_full"),
    ],
)
async def test_refusals_are_counted_with_their_reasons(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limits: dict[str, Any], error: type[Exception], reason: str
) -> None:
    async def fail(media: MediaStore, key: str, content: bytes | Path) -> None:
        raise MediaStoreFullError("the server's media store is full")

    refusals = Refusals()
    async with running_server(tmp_path, observer=refusals, **limits) as server:
        server.device.hold = True
        if limits:
            await server.create()
        assert refusals.reasons == []
        monkeypatch.setattr(MediaStore, "put", fail)
        with pytest.raises(error):
            await create(server)
        assert refusals.reasons == [reason]
