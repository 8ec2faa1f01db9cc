"""Leases are renewed by a thread of their own."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Mapping
from typing import Any, cast

import pytest

from testbed.patience import GUARD_SECONDS, until
from vllm_omni.errors import UnavailableError
from vllm_omni.video_jobs.lease_keeper import LeaseKeeper

LEASE_SECONDS = 0.03


class FakeStore:
    """Notes renewals; `errors` are raised one by one before."""

    def __init__(self) -> None:
        self.renewals: list[tuple[dict[str, int], dict[str, int]]] = []
        self.errors: list[Exception] = []
        self.gone: set[str] = set()
        self.renewed = threading.Event()

    async def renew(self, claims: Mapping[str, int], progress: Mapping[str, int]) -> set[str]:
        if self.errors:
            raise self.errors.pop(0)
        self.renewals.append((dict(claims), dict(progress)))
        self.renewed.set()
        return self.gone & claims.keys()


@pytest.fixture
def store() -> FakeStore:
    return FakeStore()


@pytest.fixture
def gone() -> list[set[str]]:
    return []


@pytest.fixture
async def keeper(store: FakeStore, gone: list[set[str]]) -> AsyncIterator[LeaseKeeper]:
    keeper = LeaseKeeper(cast(Any, store), LEASE_SECONDS, gone.append, lambda job_ids: None)
    keeper.start()
    yield keeper
    await keeper.close()


class Clock:
    """Time that stands still until a test sets it; counts the looks at it."""

    def __init__(self) -> None:
        self.now = 100.0
        self.looks = threading.Semaphore(0)

    def __call__(self) -> float:
        self.looks.release()
        return self.now

    def wait_for_looks(self, number: int) -> None:
        """Block the event loop until the clock was looked at `number` times from now on."""
        while self.looks.acquire(blocking=False):
            pass
        for _ in range(number):
            assert self.looks.acquire(timeout=GUARD_SECONDS), "the thread has stopped"


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
async def keeper_of_clock(store: FakeStore, gone: list[set[str]], clock: Clock) -> AsyncIterator[LeaseKeeper]:
    keeper = LeaseKeeper(cast(Any, store), LEASE_SECONDS, gone.append, lambda job_ids: None, clock)
    keeper.start()
    yield keeper
    await keeper.close()


async def test_leases_are_renewed_while_the_event_loop_is_busy(
    store: FakeStore, keeper_of_clock: LeaseKeeper, clock: Clock
) -> None:
    await asyncio.sleep(0)  # the first beat
    keeper_of_clock.hold("a", 1)
    clock.now += 0.9 * LEASE_SECONDS
    for _ in range(2):
        store.renewed.clear()
        assert store.renewed.wait(GUARD_SECONDS), "this blocks the event loop"
    assert ({"a": 1}, {}) in store.renewals


async def test_leases_of_a_hanging_event_loop_end_until_it_runs_again(
    store: FakeStore, keeper_of_clock: LeaseKeeper, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    keeper_of_clock.hold("a", 1)
    await until(lambda: store.renewals)
    clock.now += LEASE_SECONDS
    # No await from here on: the loop hangs. The first look may belong to a renewal that was under way.
    clock.wait_for_looks(2)
    store.renewals.clear()
    keeper_of_clock.note_progress("a", 1, 40)
    clock.wait_for_looks(3)
    assert store.renewals == []
    hanging = [record.message for record in caplog.records]
    assert hanging == ["the event loop hangs for 0.0 s: leases of video jobs are renewed no more"]
    await until(lambda: store.renewals)
    assert store.renewals[0] == ({"a": 1}, {"a": 40}), "the progress is not forgotten"


async def test_progress_is_reported_once_and_soon(store: FakeStore, gone: list[set[str]]) -> None:
    stored: list[set[str]] = []
    keeper = LeaseKeeper(cast(Any, store), GUARD_SECONDS, gone.append, stored.append)
    keeper.start()
    keeper.hold("a", 1)
    keeper.note_progress("a", 1, 40)
    keeper.note_progress("a", 0, 90)  # its claim is an older one
    await until(lambda: store.renewals)
    assert store.renewals[0] == ({"a": 1}, {"a": 40})
    await until(lambda: stored)
    assert stored == [{"a"}]
    await keeper.close()


async def test_a_store_that_is_away_ends_no_lease_keeping(store: FakeStore, keeper: LeaseKeeper) -> None:
    store.errors = [UnavailableError("away"), ZeroDivisionError("a bug")]
    keeper.hold("a", 1)
    keeper.note_progress("a", 1, 40)
    await until(lambda: store.renewals)
    assert store.renewals[0] == ({"a": 1}, {"a": 40}), "the progress is not forgotten"


async def test_lost_jobs_are_told_on_the_loop_unless_they_were_claimed_again(
    store: FakeStore, keeper: LeaseKeeper, gone: list[set[str]]
) -> None:
    store.gone = {"a"}
    keeper.hold("a", 1)
    keeper.hold("b", 1)
    await until(lambda: gone)
    assert gone[0] == {"a"}
    keeper.drop("a", 1)
    keeper.hold("a", 2)
    keeper.drop("a", 1)
    store.gone = set()
    store.renewals.clear()
    await until(lambda: ({"a": 2, "b": 1}, {}) in store.renewals)


async def test_dropped_leases_are_not_renewed(store: FakeStore, keeper: LeaseKeeper) -> None:
    keeper.hold("a", 1)
    await until(lambda: store.renewals)
    keeper.drop("a", 1)
    keeper.hold("b", 1)
    store.renewals.clear()
    await until(lambda: store.renewals)
    await until(lambda: store.renewals[-1] == ({"b": 1}, {}))
    await asyncio.sleep(0)
