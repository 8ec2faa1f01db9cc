"""Listeners of one job share its look-ups and its events."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from pathlib import Path

import pytest

from testbed.fakes import FakeExecutor
from testbed.patience import until
from tests.video_jobs.service.servers import OWNER, Server, running_server, until_next_turn
from tests.video_jobs.service.test_life_of_a_job import held_device, run_until
from vllm_omni.errors import JobNotFoundError
from vllm_omni.video_jobs.store.job_store import JobStore
from vllm_omni.video_jobs.watching import PreviewImage, Progress, VideoEvent

NUM_LISTENERS = 50


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the queries about jobs so far."""
    names: list[str] = []
    for name in ("get", "queued_before"):

        def counted(self: JobStore, *args: object, name: str = name, call: object = getattr(JobStore, name)) -> object:
            names.append(name)
            assert callable(call)
            return call(self, *args)

        monkeypatch.setattr(JobStore, name, counted)
    return names


async def start_listening(server: Server, job_id: str) -> list[AsyncGenerator[VideoEvent]]:
    """Streams of a job that have got their first event."""
    streams = [server.videos.events(job_id, OWNER) for _ in range(NUM_LISTENERS)]
    firsts = await asyncio.gather(*(anext(stream) for stream in streams))
    assert all(isinstance(event, Progress) for event in firsts)
    return streams


async def test_listeners_of_a_job_share_its_look_ups(tmp_path: Path, looks: list[str]) -> None:
    device = FakeExecutor(hold=True)
    async with running_server(tmp_path, device) as server:
        await server.create()
        await until(lambda: device.pending)
        waiting = await server.create()
        looks.clear()
        streams = await start_listening(server, waiting.id)
        nexts = [asyncio.ensure_future(anext(stream)) for stream in streams]
        while looks.count("get") < 10:
            await until_next_turn()
        assert looks.count("queued_before") <= 11, "one look-up of each kind serves all listeners"
        await server.videos.delete(waiting.id, OWNER)
        ends = await asyncio.gather(*nexts, return_exceptions=True)
        assert {type(end) for end in ends} == {JobNotFoundError}
        num_looks = len(looks)
        for _ in range(10):
            await until_next_turn()
        assert len(looks) == num_looks, "nobody listens any more"


async def test_listeners_get_the_same_events(tmp_path: Path) -> None:
    device = held_device()
    async with running_server(tmp_path, device) as server:
        job = await server.create(num_previews=1)
        streams = await start_listening(server, job.id)

        async def preview(stream: AsyncGenerator[VideoEvent]) -> VideoEvent:
            async with aclosing(stream):
                return await anext(event async for event in stream if isinstance(event, PreviewImage))

        previews = asyncio.gather(*map(preview, streams))
        await run_until(device, previews.done)
        assert len(set(await previews)) == 1, "one object, so that it is encoded once"


async def test_a_new_listener_sees_no_older_state_than_its_client_knows(tmp_path: Path) -> None:
    """A look-up that ended before may be older than the answer that its client has got."""
    device = held_device()
    async with running_server(tmp_path, device, poll_seconds=1000.0) as server:
        job = await server.create()
        (first, *_) = await start_listening(server, job.id)
        parts = server.videos._parts
        assert parts is not None
        parts.watcher._live = {}  # as if another server ran it: no change of it is told here
        await run_until(device, lambda: any(live.has_started for live in parts.claimer.live.values()))
        await server.until_status(job.id, "in_progress")
        async with aclosing(server.videos.events(job.id, OWNER)) as late:
            assert (await anext(late)).view.job.status == "in_progress"
        assert (await anext(first)).view.job.status == "in_progress", "the look-up serves all"
