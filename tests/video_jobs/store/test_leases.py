"""Claims of jobs: who may run one, until when, and what a late server may not write."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from typing import Any

import pytest

from testbed.patience import until
from tests.video_jobs.store.stores import (
    LEASE_SECONDS,
    MODEL,
    OWNER,
    UNKNOWN,
    Clock,
    claim_one,
    new_job,
    open_test_store,
    publish,
    run_program,
    start_one,
)
from vllm_omni.video_jobs.records import (
    MAX_ATTEMPTS,
    ClaimedJob,
    LeaseLostError,
    StoreFullError,
    TooManyJobsError,
)
from vllm_omni.video_jobs.store import leases, visible
from vllm_omni.video_jobs.store.job_store import JobStore

WRITES: dict[str, Callable[[JobStore, str, int], Awaitable[object]]] = {
    "note_started": lambda store, job_id, fence: store.note_started(job_id, fence),
    "note_checkpoint": lambda store, job_id, fence: store.note_checkpoint(job_id, fence, "late"),
    "complete": lambda store, job_id, fence: store.complete(job_id, fence, {"video": "late"}),
    "fail": lambda store, job_id, fence: store.fail(job_id, fence, "late", "late"),
    "release": lambda store, job_id, fence: store.release(job_id, fence),
}


async def check_refused(store: JobStore, claimed: ClaimedJob, name: str) -> None:
    """Check that a write of `claimed` is refused and changes no status."""
    before = await store.counts(MODEL)
    with pytest.raises(LeaseLostError, match=claimed.job.id):
        await WRITES[name](store, claimed.job.id, claimed.fence)
    assert await store.counts(MODEL) == before


async def test_the_order_of_claims_is_priority_then_age_then_id(store: JobStore) -> None:
    jobs = [
        await publish(store, priority=priority, created_at=created_at)
        for priority, created_at in ((0, 1.0), (0, 0.0), (5, 0.0), (-5, 9.0), (0, 0.0))
    ]
    ordered = sorted(jobs, key=lambda job: (job.priority, job.created_at, job.id))
    first, rest = await store.claim("one", MODEL, 2), await store.claim("two", MODEL, 9)
    assert [claimed.job.id for claimed in first + rest] == [job.id for job in ordered]
    assert await store.claim("three", MODEL, 9) == []


async def test_only_a_server_of_the_same_model_claims_a_job(store: JobStore) -> None:
    job = await publish(store, model="an alias", served_model="another model")
    assert await store.claim("a server", "an alias", 1) == []
    assert await store.claim("a server", MODEL, 1) == []
    assert [claimed.job.id for claimed in await store.claim("a server", "another model", 1)] == [job.id]


async def test_no_job_is_claimed_by_a_call_for_none(store: JobStore) -> None:
    await publish(store)
    assert await store.claim("a server", MODEL, 0) == []


async def test_jobs_to_be_skipped_are_left_to_other_servers(store: JobStore) -> None:
    jobs = [await publish(store, created_at=float(number)) for number in range(3)]
    (claimed,) = await store.claim("a server", MODEL, 9, [jobs[0].id, jobs[2].id])
    assert claimed.job.id == jobs[1].id
    assert len(await store.claim("another server", MODEL, 9)) == 2


async def test_a_job_is_claimed_again_when_its_lease_ends(store: JobStore, clock: Clock) -> None:
    first = await start_one(store)
    await store.note_checkpoint(first.job.id, first.fence, "a/1/checkpoint-3.safetensors")
    await store.renew({first.job.id: first.fence}, {first.job.id: 30})
    clock.advance(LEASE_SECONDS - 1)
    assert await store.claim("another server", MODEL, 1) == []
    clock.advance(1)
    second = await claim_one(store, "another server")
    assert second.fence > first.fence
    job = second.job
    assert (job.status, job.progress, job.checkpoint, job.started_at, job.num_attempts) == (
        "in_progress",
        30,
        "a/1/checkpoint-3.safetensors",
        1000.0,
        2,
    )


async def test_a_renewed_lease_holds(store: JobStore, clock: Clock) -> None:
    claimed = await start_one(store)
    for _ in range(3):
        clock.advance(LEASE_SECONDS - 1)
        assert await store.renew({claimed.job.id: claimed.fence}, {}) == set()
        assert await store.claim("another server", MODEL, 1) == []


async def test_a_server_that_was_away_may_go_on_if_nobody_else_began(store: JobStore, clock: Clock) -> None:
    claimed = await start_one(store)
    clock.advance(10 * LEASE_SECONDS)
    assert await store.renew({claimed.job.id: claimed.fence}, {}) == set()
    assert await store.claim("another server", MODEL, 1) == []
    await store.complete(claimed.job.id, claimed.fence, {})


@pytest.mark.parametrize("name", WRITES)
async def test_a_late_write_is_refused(store: JobStore, clock: Clock, name: str) -> None:
    claimed = await start_one(store)
    clock.advance(LEASE_SECONDS)
    current = await claim_one(store, "another server")
    await check_refused(store, claimed, name)
    assert await store.get(claimed.job.id, OWNER) == current.job
    await store.complete(current.job.id, current.fence, {"video": "new"})
    await check_refused(store, claimed, name)
    assert (await store.get(claimed.job.id, OWNER)).outputs == {"video": "new"}


@pytest.mark.parametrize("name", WRITES)
async def test_a_write_after_the_end_is_refused(store: JobStore, name: str) -> None:
    claimed = await start_one(store)
    await store.complete(claimed.job.id, claimed.fence, {"video": "first"})
    done = await store.get(claimed.job.id, OWNER)
    await check_refused(store, claimed, name)
    assert await store.get(claimed.job.id, OWNER) == done


@pytest.mark.parametrize("name", WRITES)
async def test_a_write_after_a_release_is_refused(store: JobStore, name: str) -> None:
    claimed = await start_one(store)
    await store.release(claimed.job.id, claimed.fence)
    await check_refused(store, claimed, name)


@pytest.mark.parametrize("name", sorted(set(WRITES) - {"release"}))
async def test_a_write_to_a_deleted_job_is_refused(store: JobStore, name: str) -> None:
    claimed = await start_one(store)
    await store.begin_delete(claimed.job.id, OWNER)
    await check_refused(store, claimed, name)


async def test_renewing_returns_the_claims_that_are_lost(store: JobStore, clock: Clock) -> None:
    taken = await start_one(store)
    clock.advance(LEASE_SECONDS)
    await claim_one(store, "another server")
    deleted, released, done, kept = [await start_one(store) for _ in range(4)]
    await store.begin_delete(deleted.job.id, OWNER)
    await store.release(released.job.id, released.fence)
    await store.complete(done.job.id, done.fence, {})
    claims = {claimed.job.id: claimed.fence for claimed in (taken, deleted, released, done, kept)}
    lost = await store.renew({**claims, UNKNOWN: 1}, dict.fromkeys(claims, 50))
    assert lost == {*claims, UNKNOWN} - {kept.job.id}
    assert (await store.get(kept.job.id, OWNER)).progress == 50
    assert (await store.get(taken.job.id, OWNER)).progress == 0


async def test_a_released_job_is_claimed_at_once_and_keeps_its_work(store: JobStore) -> None:
    claimed = await start_one(store)
    await store.note_checkpoint(claimed.job.id, claimed.fence, "a/1/checkpoint-3.safetensors")
    await store.renew({claimed.job.id: claimed.fence}, {claimed.job.id: 30})
    await store.release(claimed.job.id, claimed.fence)
    again = await claim_one(store)
    assert again.fence > claimed.fence
    assert (again.job.progress, again.job.checkpoint) == (30, "a/1/checkpoint-3.safetensors")
    assert (again.job.status, again.job.num_attempts) == ("in_progress", 1)


async def test_a_new_checkpoint_returns_the_one_before(store: JobStore, clock: Clock) -> None:
    claimed = await start_one(store)
    job_id = claimed.job.id
    assert await store.note_checkpoint(job_id, claimed.fence, "a/1/checkpoint-3.safetensors") is None
    assert await store.note_checkpoint(job_id, claimed.fence, "a/1/checkpoint-3.safetensors") is None
    old = await store.note_checkpoint(job_id, claimed.fence, "a/1/checkpoint-6.safetensors")
    assert old == "a/1/checkpoint-3.safetensors"
    clock.advance(LEASE_SECONDS)
    claimed = await claim_one(store)
    old = await store.note_checkpoint(job_id, claimed.fence, "a/2/checkpoint-9.safetensors")
    assert old == "a/1/checkpoint-6.safetensors"


async def test_a_job_that_its_servers_do_not_survive_fails(store: JobStore, clock: Clock) -> None:
    job = await publish(store)
    waiting = await publish(store, created_at=2000.0)
    for attempt in range(1, MAX_ATTEMPTS + 1):
        assert (await claim_one(store)).job.num_attempts == attempt
        clock.advance(LEASE_SECONDS)
    # The call that finds the job so claims another in its place.
    assert (await claim_one(store)).job.id == waiting.id
    failed = await store.get(job.id, OWNER)
    assert (failed.status, failed.error_code, failed.completed_at) == ("failed", "too_many_attempts", clock.now)
    assert failed.error_message == "3 servers in a row ended while they made this video; it is not tried again."


async def test_a_long_job_may_lose_any_number_of_servers_while_it_makes_progress(store: JobStore, clock: Clock) -> None:
    job = await publish(store)
    for attempt in range(3 * MAX_ATTEMPTS):
        claimed = await claim_one(store)
        if attempt % 2:
            await store.note_checkpoint(job.id, claimed.fence, f"checkpoint-{attempt}")
        clock.advance(LEASE_SECONDS)
    # From the last checkpoint on, the number is the same as for any job.
    for _ in range(MAX_ATTEMPTS - 2):
        await claim_one(store)
        clock.advance(LEASE_SECONDS)
    assert await store.claim("a server", MODEL, 1) == []
    failed = await store.get(job.id, OWNER)
    assert (failed.error_code, failed.num_attempts) == ("too_many_attempts", 4 * MAX_ATTEMPTS - 2)


async def test_releases_do_not_count_as_attempts(store: JobStore) -> None:
    job = await publish(store)
    for _ in range(2 * MAX_ATTEMPTS):
        claimed = await claim_one(store)
        await store.release(job.id, claimed.fence)
    assert (await store.get(job.id, OWNER)).num_attempts == 0


async def test_claims_of_a_cancelled_call_are_released(
    store_url: str, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, other = open_test_store(store_url, clock), open_test_store(store_url, clock)
    job = await publish(store)
    begun, may_claim = threading.Event(), threading.Event()
    claim = leases.claim

    def slow_claim(*arguments: Any, **named: Any) -> list[ClaimedJob]:
        begun.set()
        may_claim.wait()
        return claim(*arguments, **named)

    monkeypatch.setattr(leases, "claim", slow_claim)
    call = asyncio.create_task(store.claim("a server", MODEL, 1))
    await asyncio.to_thread(begun.wait)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    may_claim.set()
    await store.close()  # waits for the claim and its release
    monkeypatch.undo()
    again = await claim_one(other)
    assert (again.job.id, again.job.num_attempts) == (job.id, 1)
    assert again.fence > 1  # the cancelled claim was made
    await other.close()


async def test_a_cancelled_claim_is_released_in_a_thread(store: JobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the claim has ended already: the event loop never waits for the database."""
    await publish(store)
    threads: set[threading.Thread] = set()
    release = leases.release

    def noted(*arguments: Any, **named: Any) -> None:
        threads.add(threading.current_thread())
        release(*arguments, **named)

    submitted: list[Future[Any]] = []
    submit = store._submit

    def submit_noted(*arguments: Any) -> Future[Any]:
        submitted.append(submit(*arguments))
        return submitted[-1]

    monkeypatch.setattr(leases, "release", noted)
    monkeypatch.setattr(store, "_submit", submit_noted)
    call = asyncio.ensure_future(store.claim("a server", MODEL, 1))
    await asyncio.sleep(0)
    submitted[0].result()  # blocks the event loop, which has not noticed the end when the call is cancelled
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    await until(lambda: threads)
    assert threading.current_thread() not in threads
    assert (await claim_one(store)).job.num_attempts == 1


async def test_renewals_do_not_wait_for_other_calls(store: JobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    claimed, may_read = await start_one(store), threading.Event()
    monkeypatch.setattr(visible, "get", lambda *arguments, **named: may_read.wait())
    reads = [asyncio.create_task(store.get(claimed.job.id, OWNER)) for _ in range(20)]
    await asyncio.sleep(0)
    try:
        assert await store.renew({claimed.job.id: claimed.fence}, {}) == set()
        assert not any(read.done() for read in reads)
    finally:
        may_read.set()
    await asyncio.gather(*reads)


async def claim_all(store: JobStore) -> list[str]:
    """Ids of all jobs that one server can claim, a few at a time."""
    ids: list[str] = []
    while claimed := await store.claim("a server", MODEL, 3):
        ids += [each.job.id for each in claimed]
    return ids


async def test_processes_that_claim_at_the_same_time_get_different_jobs(sqlite_url: str, clock: Clock) -> None:
    store = open_test_store(sqlite_url, clock)
    jobs = [await publish(store) for _ in range(40)]
    claimed = [line.split() for line in (await run_program("claimers", sqlite_url)).splitlines()]
    assert len(claimed) == 8
    assert Counter(job_id for ids in claimed for job_id in ids) == Counter(job.id for job in jobs)
    await store.close()


@pytest.mark.thorough
async def test_connections_that_claim_at_the_same_time_get_different_jobs(postgres_url: str, clock: Clock) -> None:
    store = open_test_store(postgres_url, clock)
    jobs = [await publish(store) for _ in range(40)]
    stores = [open_test_store(postgres_url, clock) for _ in range(8)]
    claimed = await asyncio.gather(*(claim_all(each) for each in stores))
    assert Counter(job_id for ids in claimed for job_id in ids) == Counter(job.id for job in jobs)
    for each in (store, *stores):
        await each.close()


@pytest.mark.thorough
async def test_every_job_ends_once_whatever_its_servers_go_through(store_url: str) -> None:
    store = open_test_store(store_url, None)
    jobs = [await publish(store) for _ in range(100)]
    output = await run_program("servers", store_url)
    claims: dict[str, int] = {}
    completions: list[tuple[str, int]] = []
    for word, job_id, fence in map(str.split, output.splitlines()):
        if word == "completed":
            completions.append((job_id, int(fence)))
        else:
            claims[job_id] = max(claims.get(job_id, 0), int(fence))
    ended = [await store.get(job.id, OWNER) for job in jobs]
    assert {job.status for job in ended} <= {"completed", "failed"}
    assert {job.error_code for job in ended} <= {None, "too_many_attempts"}
    # Each completed row is the work of exactly one claim, the last one.
    assert sorted(completions) == sorted(
        (job.id, int(job.outputs["video"])) for job in ended if job.status == "completed"
    )
    assert [fence for job_id, fence in completions] == [claims[job_id] for job_id, _ in completions]
    assert completions
    await store.close()


async def test_quotas_hold_when_jobs_are_added_at_the_same_time(store_url: str, clock: Clock) -> None:
    stores = [open_test_store(store_url, clock, max_jobs=5, max_jobs_per_key=4) for _ in range(4)]
    added = await asyncio.gather(
        *(each.add(new_job(owner=owner)) for each in stores for owner in ("a", "b", "a")), return_exceptions=True
    )
    kinds = Counter(type(each) for each in added)
    assert kinds[type(None)] == 5
    assert set(kinds) <= {type(None), StoreFullError, TooManyJobsError}
    for each in stores:
        await each.close()
