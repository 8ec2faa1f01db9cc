"""Deaths of workers: how many are remembered, and the pause that follows."""

from __future__ import annotations

import pytest

from vllm_omni.diffusion.control.worker_deaths import (
    MAX_RESTART_BACKOFF_SECONDS,
    RESTART_BACKOFF_SECONDS,
    WorkerDeaths,
)


@pytest.fixture
def deaths() -> WorkerDeaths:
    return WorkerDeaths(RESTART_BACKOFF_SECONDS, MAX_RESTART_BACKOFF_SECONDS)


@pytest.mark.parametrize(
    ("num_deaths", "seconds"), [(1, 0.0), (2, 0.5), (3, 1.5), (4, 3.5), (6, 15.5), (7, 30.0), (12, 30.0), (5000, 30.0)]
)
def test_the_pause_before_a_restart_grows_up_to_half_a_minute(
    deaths: WorkerDeaths, num_deaths: int, seconds: float
) -> None:
    for _ in range(num_deaths):
        deaths.note(1000.0)
    assert deaths.pause_seconds == seconds


def test_deaths_are_forgotten_after_ten_minutes(deaths: WorkerDeaths) -> None:
    counts = []
    for now in (1000.0, 1300.0, 1599.0, 1601.0, 1901.0, 9999.0):
        deaths.note(now)
        counts.append(len(deaths))
    assert counts == [1, 2, 3, 3, 3, 1]
