"""End of jobs: expiry, and deletion of files and row together, whenever the server is killed."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.video_jobs.store.files import delete_files, sweep, write_files
from tests.video_jobs.store.stores import (
    LEASE_SECONDS,
    MODEL,
    OWNER,
    TTL_SECONDS,
    Clock,
    claim_one,
    new_job,
    open_test_store,
    publish,
    run_program,
    start_one,
)
from vllm_omni.video_jobs.records import JobNotFoundError
from vllm_omni.video_jobs.store.job_store import JobStore
from vllm_omni.video_jobs.store.limits import CREATION_SECONDS


async def test_a_deleted_job_is_invisible_at_once(store: JobStore) -> None:
    job = await publish(store)
    assert await store.begin_delete(job.id, OWNER) == job
    for call in (store.get, store.begin_delete):
        with pytest.raises(JobNotFoundError):
            await call(job.id, OWNER)
    assert await store.list(OWNER, None, 10, True) == ([], False)
    assert sum((await store.counts(MODEL)).values()) == 0
    assert await store.claim("a server", MODEL, 1) == []
    assert await store.unfinished_deletes() == [job.id]
    assert await store.end_delete(job.id)
    assert await store.unfinished_deletes() == []
    assert not await store.end_delete(job.id)


async def test_a_row_that_is_not_deleted_does_not_end(store: JobStore) -> None:
    job = await publish(store)
    assert not await store.end_delete(job.id)
    assert await store.get(job.id, OWNER) == job


async def test_the_row_stays_while_a_server_may_write_files(store: JobStore, clock: Clock) -> None:
    claimed = await start_one(store)
    deleted = await store.begin_delete(claimed.job.id, OWNER)
    assert (deleted.id, deleted.status) == (claimed.job.id, "in_progress")
    clock.advance(LEASE_SECONDS - 1)
    assert not await store.end_delete(claimed.job.id)
    assert await store.renew({claimed.job.id: claimed.fence}, {}) == {claimed.job.id}
    clock.advance(1)
    assert await store.end_delete(claimed.job.id)


async def test_a_server_that_lets_a_deleted_job_go_need_not_wait_for_the_lease(store: JobStore) -> None:
    claimed = await start_one(store)
    await store.begin_delete(claimed.job.id, OWNER)
    await store.release(claimed.job.id, claimed.fence)
    assert await store.end_delete(claimed.job.id)


async def test_an_unpublished_job_is_abandoned_by_its_creator_alone(store: JobStore) -> None:
    job = new_job()
    await store.add(job)
    with pytest.raises(JobNotFoundError):
        await store.begin_delete(job.id, OWNER)
    await store.abandon(job)
    with pytest.raises(JobNotFoundError):
        await store.publish(job.id)
    assert await store.end_delete(job.id)


async def test_a_swept_creation_comes_back_until_its_late_files_are_removed(store: JobStore, clock: Clock) -> None:
    job = new_job()
    await store.add(job)
    clock.advance(CREATION_SECONDS)
    assert await store.unfinished_deletes() == [job.id]
    assert await store.end_delete(job.id)
    await store.abandon(job)
    assert await store.unfinished_deletes() == [job.id]
    assert await store.end_delete(job.id)


async def test_a_job_whose_creator_did_not_hear_of_its_publication_is_abandoned(store: JobStore) -> None:
    claimed = await start_one(store)
    await store.abandon(claimed.job)
    assert not await store.end_delete(claimed.job.id), "its server may still write files"
    assert await store.renew({claimed.job.id: claimed.fence}, {}) == {claimed.job.id}


@pytest.mark.parametrize("ends", ["completed", "failed"])
async def test_an_ended_job_expires(store: JobStore, clock: Clock, ends: str) -> None:
    claimed = await start_one(store)
    clock.advance(LEASE_SECONDS / 2)
    if ends == "completed":
        await store.complete(claimed.job.id, claimed.fence, {})
    else:
        await store.fail(claimed.job.id, claimed.fence, "a", "b")
    clock.advance(TTL_SECONDS - 1)
    assert await store.unfinished_deletes() == []
    assert (await store.get(claimed.job.id, OWNER)).status == ends
    clock.advance(1)
    assert await store.unfinished_deletes() == [claimed.job.id]
    with pytest.raises(JobNotFoundError):
        await store.get(claimed.job.id, OWNER)


async def test_a_job_that_no_server_claims_fails(store: JobStore, clock: Clock) -> None:
    job = await publish(store)
    clock.advance(TTL_SECONDS)
    assert await store.unfinished_deletes() == []
    failed = await store.get(job.id, OWNER)
    assert (failed.status, failed.error_code) == ("failed", "expired")
    assert failed.error_message == "No server made this video within 3600 s."
    assert failed.expires_at == clock.now + TTL_SECONDS
    assert await store.claim("a server", MODEL, 1) == []


async def test_refusals_keep_no_job_and_are_told_at_its_end(store: JobStore, clock: Clock) -> None:
    job = await publish(store)
    for _ in range(4):
        claimed = await claim_one(store)
        assert await store.renew({job.id: claimed.fence}, {}) == set()
        await store.release(job.id, claimed.fence, "unknown parameter 'sharpness'")
        assert await store.unfinished_deletes() == []
        clock.advance(TTL_SECONDS / 4)
    await store.unfinished_deletes()
    failed = await store.get(job.id, OWNER)
    assert (failed.status, failed.error_code, failed.num_attempts) == ("failed", "expired", 0)
    assert failed.error_message is not None
    assert failed.error_message.endswith("within 3600 s. The last refusal: unknown parameter 'sharpness'")


async def test_a_job_that_takes_longer_than_jobs_are_kept_goes_on(store: JobStore, clock: Clock) -> None:
    claimed = await start_one(store)
    for _ in range(4):
        clock.advance(TTL_SECONDS / 2)
        assert await store.renew({claimed.job.id: claimed.fence}, {}) == set()
    await store.unfinished_deletes()
    clock.advance(LEASE_SECONDS)  # its server has died: the next has the whole time again
    await store.unfinished_deletes()
    assert (await claim_one(store)).job.status == "in_progress"


async def test_an_abandoned_creation_is_deleted(store: JobStore, clock: Clock) -> None:
    abandoned, fresh = new_job(), new_job()
    await store.add(abandoned)
    clock.advance(CREATION_SECONDS - 1)
    await store.add(fresh)
    assert await store.unfinished_deletes() == []
    clock.advance(1)
    assert await store.unfinished_deletes() == [abandoned.id]
    with pytest.raises(JobNotFoundError):
        await store.publish(abandoned.id)
    await store.publish(fresh.id)


async def test_a_kill_at_any_point_leaves_neither_file_nor_row(store_url: str, tmp_path: Path) -> None:
    output = await run_program("crashes", store_url, str(tmp_path / "media"))
    crashes = dict(line.rsplit(" ", 1) for line in output.splitlines())
    assert len(crashes) == 11
    ids = set(crashes.values())
    clock = Clock()
    store = open_test_store(store_url, clock)
    # The kill came before the delete or the end was committed: the job is there, with all its files.
    for point in ("delete: in the first transaction", "end: in the transaction"):
        job = await store.get(crashes[point], OWNER)
        assert len(list((tmp_path / "media" / job.id).iterdir())) == 2
    await sweep(store, tmp_path / "media")
    clock.advance(max(CREATION_SECONDS, LEASE_SECONDS))
    await sweep(store, tmp_path / "media")
    left = {path.name for path in (tmp_path / "media").iterdir()}
    jobs, _ = await store.list(OWNER, None, 100, True)
    assert left == {job.id for job in jobs} <= ids
    assert {point for point, job_id in crashes.items() if job_id in left} == {
        "delete: in the first transaction",
        "end: in the transaction",
        "end: before the transaction",
        "end: after the transaction",
    }
    # A job that its server left behind runs again; then all expire.
    for claimed in await store.claim("another server", MODEL, 100):
        write_files(tmp_path / "media", claimed.job.id)
        await store.complete(claimed.job.id, claimed.fence, {})
    clock.advance(TTL_SECONDS)
    await sweep(store, tmp_path / "media")
    assert list((tmp_path / "media").iterdir()) == []
    await store.close()
    assert num_rows(store_url) == 0


def num_rows(url: str) -> int:
    from sqlalchemy import create_engine, text

    engine = create_engine(url.replace("postgresql:", "postgresql+psycopg:"))
    with engine.connect() as connection:
        number: int = connection.execute(text("SELECT count(*) FROM video_jobs")).scalar_one()
    engine.dispose()
    return number


async def test_two_servers_may_sweep_at_the_same_time(store: JobStore, tmp_path: Path) -> None:
    job = await publish(store)
    write_files(tmp_path, job.id)
    await store.begin_delete(job.id, OWNER)
    assert await store.unfinished_deletes() == await store.unfinished_deletes() == [job.id]
    for _ in range(2):
        delete_files(tmp_path, job.id)
        await store.end_delete(job.id)
    assert await store.unfinished_deletes() == []
