"""Sweeps go on when the files of some jobs cannot be removed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import pytest

from vllm_omni.errors import UnavailableError
from vllm_omni.video_jobs import sweeper as sweeper_module
from vllm_omni.video_jobs.media import MediaStoreError
from vllm_omni.video_jobs.observer import VideoObserver
from vllm_omni.video_jobs.sweeper import MAX_FAILURES, MAX_PAUSE_SECONDS, Sweeper

SWEEP_SECONDS = 5.0


class FakeStores(VideoObserver):
    """Both stores and the observer. Files of `stuck` jobs raise `error`."""

    def __init__(self, num_jobs: int, num_stuck: int) -> None:
        self.jobs = [str(number) for number in range(num_jobs)]
        self.stuck = set(self.jobs[:num_stuck])
        self.error: Exception = MediaStoreError("permission denied")
        self.is_away = False
        self.tried: list[str] = []
        self.num_counts = 0

    async def unfinished_deletes(self) -> list[str]:
        return list(self.jobs)

    async def delete_tree(self, job_id: str) -> None:
        self.tried.append(job_id)
        if job_id in self.stuck:
            raise self.error

    async def end_delete(self, job_id: str) -> None:
        if self.is_away:
            raise UnavailableError("away")
        self.jobs.remove(job_id)

    async def counts(self, served_model: str) -> Mapping[str, int]:
        return {}

    def on_job_counts(self, counts: Mapping[Any, int]) -> None:
        self.num_counts += 1


def sweeper_of(stores: FakeStores) -> Sweeper:
    return Sweeper(cast(Any, stores), cast(Any, stores), stores, "model", SWEEP_SECONDS)


class Clock:
    """Stands for `time`."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(sweeper_module, "time", clock)
    return clock


@pytest.mark.parametrize("error", [MediaStoreError("permission denied"), ValueError("a bug")])
async def test_stuck_files_keep_no_other_job(clock: Clock, error: Exception) -> None:
    stores = FakeStores(num_jobs=2 * MAX_FAILURES + 3, num_stuck=MAX_FAILURES + 1)
    stores.error = error
    sweeper = sweeper_of(stores)
    await sweeper.sweep()
    assert stores.tried == stores.jobs[:MAX_FAILURES], "it may be the store that is away"
    await sweeper.sweep()
    assert set(stores.jobs) == stores.stuck
    assert stores.num_counts == 2


async def test_stuck_files_are_tried_again_ever_more_seldom(clock: Clock) -> None:
    stores = FakeStores(num_jobs=1, num_stuck=1)
    sweeper, times = sweeper_of(stores), []
    while clock.now < 3 * MAX_PAUSE_SECONDS:
        await sweeper.sweep()
        if stores.tried:
            times.append(clock.now)
            stores.tried.clear()
        clock.now += SWEEP_SECONDS
    assert times[:5] == [0, 5, 15, 35, 75]
    assert times[-1] - times[-2] == MAX_PAUSE_SECONDS
    stores.stuck.clear()
    clock.now += MAX_PAUSE_SECONDS
    await sweeper.sweep()
    assert stores.jobs == []


async def test_a_database_that_is_away_ends_the_sweep(clock: Clock) -> None:
    stores = FakeStores(num_jobs=3, num_stuck=0)
    stores.is_away = True
    with pytest.raises(UnavailableError):
        await sweeper_of(stores).sweep()
    assert len(stores.tried) == 1
