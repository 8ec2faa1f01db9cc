"""Jobs as their owners see them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import replace

import pytest

from tests.video_jobs.store.stores import (
    MODEL,
    OWNER,
    TTL_SECONDS,
    UNKNOWN,
    Clock,
    claim_one,
    new_job,
    open_test_store,
    publish,
    start_one,
)
from vllm_omni.errors import InvalidRequestError, UnavailableError
from vllm_omni.video_jobs.records import (
    JobNotFoundError,
    StoreFullError,
    TooManyJobsError,
    VideoJob,
    creation_time,
    is_job_id,
    new_job_id,
)
from vllm_omni.video_jobs.store.job_store import JobStore

STRANGE_IDS = ["", "video_", "video_" + "a" * 31, "video_" + "a" * 31 + "\0", "video_" + "\ud800" * 32, "x" * 100_000]


async def listed(store: JobStore, newest_first: bool = True) -> list[str]:
    jobs, has_more = await store.list(OWNER, None, 100, newest_first)
    assert not has_more
    return [job.id for job in jobs]


def test_ids_cannot_be_guessed() -> None:
    ids = {new_job_id(1000.0) for _ in range(1000)}
    assert len({job_id[-22:] for job_id in ids}) == 1000, "132 bits"
    assert all(is_job_id(job_id) for job_id in ids)


@pytest.mark.parametrize("seconds", [0.0, 1000.25, 1796066328.123457, 1e10])
def test_an_id_has_the_time_of_its_job(seconds: float) -> None:
    assert creation_time(new_job_id(seconds)) == seconds


async def test_a_job_is_stored_with_all_its_fields(store: JobStore) -> None:
    job = new_job(
        request={"prompt": "\0 \ud800 é", "params": {"seed": 2**63 - 1, "sigmas": [1.0, 0.5]}},
        inputs=("a/inputs/0.png", "a/inputs/1.png"),
        remixed_from=UNKNOWN,
        priority=-(2**31),
    )
    await store.add(job)
    await store.publish(job.id)
    assert await store.get(job.id, OWNER) == replace(job, expires_at=job.created_at + TTL_SECONDS)


async def test_text_that_a_database_refuses_is_escaped(store: JobStore) -> None:
    job = await publish(store, model="a\0b\ud800c")
    assert (await store.get(job.id, OWNER)).model == "a\\x00b\\ud800c"


async def test_a_job_is_invisible_until_it_is_published(store: JobStore) -> None:
    job = new_job()
    await store.add(job)
    with pytest.raises(JobNotFoundError):
        await store.get(job.id, OWNER)
    assert await listed(store) == []
    assert await store.counts(MODEL) == {"queued": 0, "in_progress": 0, "completed": 0, "failed": 0}
    assert await store.claim("a server", MODEL, 1) == []
    later = await publish(store, created_at=2000.0, owner="another key's hash")
    assert await store.queued_before([later.id, UNKNOWN]) == {later.id: (0, 0.0)}
    await store.publish(job.id)
    assert await listed(store) == [job.id]


async def test_a_job_is_published_once(store: JobStore) -> None:
    job = await publish(store)
    for job_id in (job.id, UNKNOWN):
        with pytest.raises(JobNotFoundError):
            await store.publish(job_id)


async def test_a_job_that_is_added_as_completed_is_kept_and_not_run(store_url: str, clock: Clock) -> None:
    store = open_test_store(store_url, clock, max_jobs_per_key=1)
    job = new_job(status="completed", progress=100, completed_at=1000.0, outputs={"video": "a/0/video.mp4"})
    await store.add(job)
    assert await listed(store) == []
    await store.publish(job.id)
    assert await listed(store) == [job.id]
    assert (await store.counts(MODEL))["completed"] == 1
    assert await store.claim("a server", MODEL, 1) == []
    await store.add(new_job())  # the completed one is not among the unfinished
    await store.add(new_job(status="completed", completed_at=1000.0))  # nor is it refused because of them
    clock.advance(TTL_SECONDS)
    assert job.id in await store.unfinished_deletes()
    await store.close()


async def test_a_job_is_seen_by_its_owner_alone(store: JobStore) -> None:
    job = await publish(store)
    calls: list[Callable[[str, str], Awaitable[VideoJob]]] = [store.get, store.begin_delete]
    for call in calls:
        with pytest.raises(JobNotFoundError) as for_others:
            await call(job.id, "another key's hash")
        with pytest.raises(JobNotFoundError) as for_unknown:
            await call(UNKNOWN, OWNER)
        assert str(for_others.value).replace(job.id, UNKNOWN) == str(for_unknown.value)
    assert await store.list("another key's hash", None, 10, True) == ([], False)
    assert (await store.get(job.id, OWNER)).status == "queued"


@pytest.mark.parametrize("job_id", STRANGE_IDS)
async def test_a_strange_id_is_not_found(store: JobStore, job_id: str) -> None:
    with pytest.raises(JobNotFoundError) as not_found:
        await store.get(job_id, OWNER)
    assert len(str(not_found.value)) < 200
    with pytest.raises(JobNotFoundError):
        await store.begin_delete(job_id, OWNER)
    with pytest.raises(InvalidRequestError) as invalid:
        await store.list(OWNER, job_id, 10, True)
    assert invalid.value.param == "after"


async def test_status_and_times_of_a_job_that_completes(store: JobStore, clock: Clock) -> None:
    job = await publish(store)
    clock.advance(1)
    claimed = await claim_one(store)
    assert (await store.get(job.id, OWNER)).status == "queued"
    clock.advance(1)
    await store.note_started(job.id, claimed.fence)
    running = await store.get(job.id, OWNER)
    assert (running.status, running.started_at, running.completed_at) == ("in_progress", 1002.0, None)
    clock.advance(1)
    await store.note_checkpoint(job.id, claimed.fence, "a/1/checkpoint-3.safetensors")
    await store.complete(job.id, claimed.fence, {"video": "a/1/video.mp4"}, {"seconds": "2"})
    done = await store.get(job.id, OWNER)
    assert done == replace(
        running,
        status="completed",
        progress=100,
        completed_at=1003.0,
        expires_at=1003.0 + TTL_SECONDS,
        outputs={"video": "a/1/video.mp4"},
        shown={"seconds": "2"},
    )


async def test_status_and_times_of_a_job_that_fails(store: JobStore, clock: Clock) -> None:
    claimed = await start_one(store)
    await store.renew({claimed.job.id: claimed.fence}, {claimed.job.id: 40})
    clock.advance(1)
    await store.fail(claimed.job.id, claimed.fence, "generation_failed", "The device failed: \0.")
    failed = await store.get(claimed.job.id, OWNER)
    assert (failed.status, failed.progress, failed.completed_at) == ("failed", 40, 1001.0)
    assert (failed.error_code, failed.error_message) == ("generation_failed", "The device failed: \\x00.")
    assert failed.expires_at == 1001.0 + TTL_SECONDS


async def test_progress_never_falls(store: JobStore) -> None:
    claimed = await start_one(store)
    for percent, expected in ((40, 40), (30, 40), (41, 41)):
        assert await store.renew({claimed.job.id: claimed.fence}, {claimed.job.id: percent}) == set()
        assert (await store.get(claimed.job.id, OWNER)).progress == expected


async def test_progress_that_is_stored_before_the_start_starts_the_job(store: JobStore, clock: Clock) -> None:
    await publish(store)
    claimed = await claim_one(store)
    clock.advance(1)
    assert await store.renew({claimed.job.id: claimed.fence}, {claimed.job.id: 1}) == set()
    clock.advance(1)
    await store.note_started(claimed.job.id, claimed.fence)
    running = await store.get(claimed.job.id, OWNER)
    assert (running.status, running.started_at, running.progress) == ("in_progress", 1001.0, 1)
    assert running.expires_at == 1002.0 + TTL_SECONDS


async def test_counts(store: JobStore) -> None:
    claimed = await start_one(store)
    await store.complete(claimed.job.id, claimed.fence, {})
    claimed = await start_one(store)
    await store.fail(claimed.job.id, claimed.fence, "a", "b")
    await start_one(store)
    await publish(store, owner="another key's hash")
    await publish(store, served_model="another model")
    assert await store.counts(MODEL) == {"queued": 1, "in_progress": 1, "completed": 1, "failed": 1}
    assert sum((await store.counts("another model")).values()) == 1


async def test_jobs_before_a_job_in_the_queue(store: JobStore) -> None:
    running = await start_one(store)
    first = await publish(store, created_at=1001.0, work_seconds=2.0)
    await publish(store, created_at=1003.0, work_seconds=4.0, priority=1)
    await publish(store, created_at=1000.0, served_model="another model")
    job = await publish(store, created_at=1002.0)
    other = await publish(store, created_at=1003.0, served_model="another model")
    assert await store.queued_before([job.id, first.id, other.id]) == {
        job.id: (1, 2.0),
        first.id: (0, 0.0),
        other.id: (1, 1.5),
    }
    await publish(store, created_at=1004.0, work_seconds=8.0, priority=-1)
    assert await store.queued_before([job.id]) == {job.id: (2, 10.0)}
    await store.release(running.job.id, running.fence)
    assert await store.queued_before([job.id]) == {job.id: (3, 11.5)}


@pytest.mark.parametrize("newest_first", [True, False])
async def test_pages_hold_while_jobs_are_added(store: JobStore, newest_first: bool) -> None:
    # Pairs of jobs have the same time: their ids decide.
    jobs = [await publish(store, created_at=1000.0 + number // 2) for number in range(7)]
    expected = [job.id for job in sorted(jobs, key=lambda job: (job.created_at, job.id), reverse=newest_first)]
    seen: list[str] = []
    has_more = True
    while has_more:
        page, has_more = await store.list(OWNER, seen[-1] if seen else None, 3, newest_first)
        seen += [job.id for job in page]
        # A job at the end that the pages come from.
        await publish(store, created_at=5000.0 if newest_first else 0.0)
    assert seen == expected


async def test_a_page_that_ends_with_the_last_job_has_no_more(store: JobStore) -> None:
    jobs = [await publish(store, created_at=float(number)) for number in range(3)]
    page, has_more = await store.list(OWNER, jobs[0].id, 2, False)
    assert ([job.id for job in page], has_more) == ([jobs[1].id, jobs[2].id], False)
    assert await store.list(OWNER, jobs[2].id, 2, False) == ([], False)


@pytest.mark.parametrize("newest_first", [True, False])
async def test_a_page_may_follow_a_job_that_is_gone(store: JobStore, newest_first: bool) -> None:
    jobs = [await publish(store, created_at=1000.25 + number // 2) for number in range(6)]
    seen: list[str] = []
    has_more = True
    while has_more:
        page, has_more = await store.list(OWNER, seen[-1] if seen else None, 2, newest_first)
        for job in page:
            seen.append(job.id)
            await store.begin_delete(job.id, OWNER)
            assert await store.end_delete(job.id)
    assert seen == [job.id for job in sorted(jobs, key=lambda job: (job.created_at, job.id), reverse=newest_first)]


async def test_a_page_has_the_jobs_of_its_owner_alone(store: JobStore) -> None:
    other = await publish(store, owner="another key's hash", created_at=1.0)
    mine = await publish(store, created_at=2.0)
    assert await store.list(OWNER, other.id, 10, False) == ([mine], False)
    assert await store.list(OWNER, other.id, 10, True) == ([], False)


async def test_a_key_has_a_number_of_unfinished_jobs(store_url: str, clock: Clock) -> None:
    store = open_test_store(store_url, clock, max_jobs_per_key=2)
    claimed = await start_one(store)
    await store.add(new_job())  # counts before it is published
    with pytest.raises(TooManyJobsError, match="may have 2") as refused:
        await store.add(new_job())
    assert (refused.value.status, refused.value.retryable) == (429, True)
    await store.add(new_job(owner="another key's hash"))
    await store.complete(claimed.job.id, claimed.fence, {})
    await store.add(new_job())
    await store.close()


async def test_an_owner_gets_one_job_for_a_key(store_url: str, clock: Clock) -> None:
    store = open_test_store(store_url, clock, max_jobs_per_key=1)
    job = new_job(idempotency_key="a\0\ud800 key")
    assert await store.add(job) is None
    again = replace(job, id=UNKNOWN)
    with pytest.raises(UnavailableError, match="is being made") as early:
        await store.add(again)
    assert (early.value.status, early.value.retry_after) == (503, 1.0)
    await store.publish(job.id)
    assert await store.add(again) == await store.get(job.id, OWNER), "also if the key has as many jobs as it may have"
    assert await store.add(replace(again, owner="another key's hash")) is None
    with pytest.raises(TooManyJobsError):
        await store.add(replace(again, id="", idempotency_key="another"))
    await store.close()


@pytest.mark.parametrize("end", ["deleted", "expired", "abandoned"])
async def test_the_key_of_a_job_that_is_gone_may_come_again(store: JobStore, clock: Clock, end: str) -> None:
    claimed = await start_one(store, idempotency_key="a key")
    if end == "deleted":
        await store.begin_delete(claimed.job.id, OWNER)
    elif end == "abandoned":
        await store.abandon(claimed.job)
    else:
        await store.complete(claimed.job.id, claimed.fence, {})
        clock.advance(TTL_SECONDS)
        assert await store.unfinished_deletes() == [claimed.job.id]
    assert await store.add(new_job(idempotency_key="a key")) is None


async def test_the_store_has_a_number_of_rows(store_url: str, clock: Clock) -> None:
    store = open_test_store(store_url, clock, max_jobs=2)
    claimed = await start_one(store)
    await store.complete(claimed.job.id, claimed.fence, {})
    job = await publish(store)
    with pytest.raises(StoreFullError, match="takes 2 jobs") as refused:
        await store.add(new_job())
    assert (refused.value.status, refused.value.retryable) == (507, False)
    await store.begin_delete(job.id, OWNER)
    assert await store.end_delete(job.id)
    await store.add(new_job())
    await store.close()


async def test_one_key_does_not_fill_the_store_for_others(store_url: str, clock: Clock) -> None:
    store = open_test_store(store_url, clock, max_jobs=3)
    kept = []
    for _ in range(3):
        claimed = await start_one(store)
        await store.complete(claimed.job.id, claimed.fence, {})
        kept.append(claimed.job.id)
        clock.advance(1)
    with pytest.raises(StoreFullError):
        await store.add(new_job())
    other = "another key's hash"
    await publish(store, owner=other)
    assert await store.unfinished_deletes() == kept[:1], "the oldest"
    assert await store.end_delete(kept[0])
    await publish(store, owner=other)
    assert await store.unfinished_deletes() == [kept[1]]
    assert await store.end_delete(kept[1])
    with pytest.raises(StoreFullError):
        await store.add(new_job(owner=other))  # it has more jobs than the other one keeps
    assert await store.unfinished_deletes() == []
    await store.close()


async def test_a_completed_job_is_never_refused(store_url: str, clock: Clock) -> None:
    """Its video is made already: nothing is gained by losing it."""
    store = open_test_store(store_url, clock, max_jobs=1, max_jobs_per_key=1)
    await publish(store)
    completed = [new_job(status="completed", completed_at=clock.now + number) for number in range(2)]
    for job in completed:
        await store.add(job)
        await store.publish(job.id)
    assert await store.unfinished_deletes() == [completed[0].id], "the second one takes its place"
    await store.close()


@pytest.mark.thorough
async def test_leases_on_postgres_follow_its_clock(postgres_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_test_store(postgres_url, None)
    await publish(store)
    await claim_one(store)
    # A server whose own clock is far ahead sees that the lease holds.
    monkeypatch.setattr("time.time", lambda: 1e12)
    other = open_test_store(postgres_url, None)
    assert await other.claim("another server", MODEL, 1) == []
    for each in (store, other):
        await each.close()
