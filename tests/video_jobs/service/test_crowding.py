"""A job that a busy server has claimed and cannot begin goes to an idle server of the same store."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import Any

import pytest

from tests.video_jobs.service.servers import Server, running_server, until_next_turn
from tests.video_jobs.service.test_life_of_a_job import held_device, run_until
from vllm_omni.video_jobs import crowding
from vllm_omni.video_jobs.records import MAX_ATTEMPTS

LONG: dict[str, Any] = {"height": 96, "width": 96, "num_inference_steps": 200}
"""A job of half a minute that leaves some room in a step, but not for another one of its size."""
SHORT = {**LONG, "num_inference_steps": 4}
IN_ORDER = {"scheduling_policy": "fcfs"}


@pytest.fixture(autouse=True)
def no_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crowding, "PATIENCE_SECONDS", 0.0)
    monkeypatch.setattr(crowding, "PATIENCE_STEPS", 0)


def live_ids(server: Server) -> set[str]:
    assert server.videos._parts is not None
    return {*server.videos._parts.claimer.live}


async def test_an_idle_server_runs_the_job_that_a_busy_one_cannot_begin(tmp_path: Path) -> None:
    device = held_device()
    async with running_server(tmp_path, device, config=IN_ORDER) as busy:
        long = await busy.create(**LONG)
        await run_until(device, lambda: device.num_plans >= 3)
        assert live_ids(busy) == {long.id}
        waiting = await busy.create(**SHORT)
        async with running_server(tmp_path) as idle:
            ended = await idle.ended(waiting.id)
            assert (ended.status, ended.num_attempts) == ("completed", 1), "what goes back is no attempt"


async def test_a_crowded_server_claims_no_job_until_it_has_room(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    device = held_device()
    async with running_server(tmp_path, device, config=IN_ORDER) as server:
        long = await server.create(**LONG)
        await run_until(device, lambda: device.num_plans >= 3)
        waiting = await server.create(**SHORT)
        while f"video job {waiting.id} goes back to the store" not in caplog.text or waiting.id in live_ids(server):
            await until_next_turn()
        for _ in range(20):
            await until_next_turn()
            assert live_ids(server) == {long.id}
        await server.videos.delete(long.id, "owner")
        device.hold = False
        device.release_results(len(device.pending))
        ended = await server.ended(waiting.id)
        assert ended.status == "completed"
        assert ended.num_attempts < MAX_ATTEMPTS


async def test_a_job_that_is_about_to_begin_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crowding, "SOON_SECONDS", 1000.0)
    device = held_device()
    async with running_server(tmp_path, device, config=IN_ORDER) as server:
        first = await server.create(**SHORT)
        await run_until(device, lambda: device.num_plans >= 3)
        second = await server.create(**SHORT)
        while second.id not in live_ids(server):
            await until_next_turn()
        for _ in range(20):
            await until_next_turn()
            assert live_ids(server) == {first.id, second.id}


@pytest.mark.soak  # at times a job waits here without end: a race between the claim and the sleep
@pytest.mark.parametrize("level", [1, 2])
async def test_jobs_of_a_server_that_sleeps_go_to_others(tmp_path: Path, level: int) -> None:
    device = held_device()
    async with running_server(tmp_path, device) as sleepy:
        begun = await sleepy.create(**SHORT)
        await run_until(device, lambda: device.num_plans >= 3)
        sleep = asyncio.create_task(sleepy.omni.sleep(level))
        await run_until(device, sleep.done)
        later = await sleepy.create(**SHORT)
        async with running_server(tmp_path) as awake:
            for job in (begun, later):
                ended = await awake.ended(job.id)
                assert (ended.status, ended.num_attempts) == ("completed", 1)
        num_plans = device.num_plans
        last = await sleepy.create(**SHORT)
        for _ in range(20):
            await until_next_turn()
        assert live_ids(sleepy) == set()
        assert device.num_plans == num_plans
        device.hold = False
        await sleepy.omni.wake_up()
        assert (await sleepy.ended(last.id)).status == "completed"
