"""Databases that fail: a locked file, a full disk, a server that is lost."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from sqlalchemy import Engine, event
from sqlalchemy.exc import IntegrityError, OperationalError
from sqlalchemy.orm import Session
from sqlalchemy.pool import Pool

from testbed.postgres import PostgresServer
from tests.video_jobs.store.stores import MODEL, OWNER, Clock, new_job, open_test_store, publish, start_one
from vllm_omni.errors import StoreFullError, UnavailableError
from vllm_omni.video_jobs.store import database as database_module
from vllm_omni.video_jobs.store.database import Database
from vllm_omni.video_jobs.store.job_store import JobStore


def failure(message: str = "disk I/O error") -> OperationalError:
    return OperationalError("SELECT secret", None, sqlite3.OperationalError(message))


@contextmanager
def listening(target: Any, name: str, call: Callable[..., object]) -> Iterator[None]:
    event.listen(target, name, call)
    try:
        yield
    finally:
        event.remove(target, name, call)


class Failing:
    """Statements of a transaction, or a listener, that fail the first times."""

    def __init__(self, num_failures: int) -> None:
        self.num_failures = num_failures
        self.num_calls = 0

    def __call__(self, *arguments: object) -> str:
        self.num_calls += 1
        if self.num_calls <= self.num_failures:
            raise failure()
        return "done"


def close_connections(postgres: PostgresServer) -> None:
    """Close all connections of stores, which notice it at their next statement."""
    postgres.execute("SELECT pg_terminate_backend(pid, 60000) FROM pg_stat_activity WHERE datname LIKE 'test_%'")


@pytest.fixture
def database(store_url: str) -> Iterator[Database]:
    database = Database(store_url)
    yield database
    database.close()


def test_statements_that_fail_once_are_run_again(database: Database) -> None:
    for run in (database.read, database.write):
        work = Failing(1)
        assert run(work) == "done"
        assert work.num_calls == 2


def test_statements_that_fail_twice_are_an_error(database: Database, caplog: pytest.LogCaptureFixture) -> None:
    work = Failing(2)
    with pytest.raises(UnavailableError) as unavailable:
        database.write(work)
    assert str(unavailable.value) == "The store of video jobs does not answer now; try again later."
    assert (unavailable.value.status, unavailable.value.retryable) == (503, True)
    # The cause is logged once, without the statement.
    assert [record.getMessage() for record in caplog.records] == ["job store: OperationalError: disk I/O error"]


def test_a_commit_that_fails_is_not_run_again(database: Database) -> None:
    work = Failing(0)
    with listening(Engine, "commit", Failing(1)), pytest.raises(UnavailableError):
        database.write(work)
    assert work.num_calls == 1


async def test_a_mistake_of_ours_is_no_failure_of_the_database(store: JobStore) -> None:
    job = await publish(store)
    with pytest.raises(IntegrityError):
        await store.add(job)


def test_commits_of_sqlite_outlast_a_loss_of_power(sqlite_url: str) -> None:
    database = Database(sqlite_url)

    def modes(session: Session, now: float) -> list[object]:
        connection = session.connection()
        return [connection.exec_driver_sql(f"PRAGMA {name}").scalar_one() for name in ("journal_mode", "synchronous")]

    assert database.read(modes) == ["wal", 2]  # 2: FULL
    database.close()


async def test_a_locked_file_is_unavailable_until_it_is_free(
    sqlite_url: str, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database_module, "_BUSY_SECONDS", 0.01)
    store = open_test_store(sqlite_url, clock)
    job = await publish(store)
    other = sqlite3.connect(sqlite_url.removeprefix("sqlite:///"), isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(UnavailableError):
        await store.add(new_job())
    assert await store.get(job.id, OWNER) == job  # readers do not wait for a writer
    other.execute("ROLLBACK")
    other.close()
    await store.add(new_job())
    await store.close()


async def test_a_full_disk_refuses_new_jobs_and_keeps_the_others(sqlite_url: str, clock: Clock) -> None:
    def limit(connection: Any, record: object) -> None:
        # Fewer pages than there are already means: no further ones.
        connection.execute("PRAGMA max_page_count=1")

    await open_test_store(sqlite_url, clock).close()
    with listening(Pool, "connect", limit):
        store = open_test_store(sqlite_url, clock)
        with pytest.raises(StoreFullError, match="its disk has no room") as full:
            await store.add(new_job(request={"prompt": "a" * 1_000_000}))
        assert (full.value.status, full.value.code) == (507, "store_full")
        claimed = await start_one(store)
        await store.complete(claimed.job.id, claimed.fence, {})
        await store.close()


@pytest.mark.thorough
async def test_a_full_disk_of_postgres_refuses_new_jobs(
    postgres: PostgresServer, postgres_url: str, clock: Clock
) -> None:
    store = open_test_store(postgres_url, clock)
    name = postgres_url.partition("@/")[2].partition("?")[0]
    postgres.execute(
        "CREATE FUNCTION fill() RETURNS trigger LANGUAGE plpgsql AS "
        "$$ BEGIN RAISE EXCEPTION 'no space left' USING ERRCODE = '53100'; END $$",
        name,
    )
    postgres.execute("CREATE TRIGGER full_disk BEFORE INSERT ON video_jobs EXECUTE FUNCTION fill()", name)
    with pytest.raises(StoreFullError, match="its disk has no room"):
        await store.add(new_job())
    assert sum((await store.counts(MODEL)).values()) == 0
    await store.close()


@pytest.mark.thorough
async def test_connections_that_postgres_closed_are_made_again(
    postgres: PostgresServer, postgres_url: str, clock: Clock
) -> None:
    store = open_test_store(postgres_url, clock)
    job = await publish(store)
    for _ in range(3):
        close_connections(postgres)
        assert await store.get(job.id, OWNER) == job
    await store.close()


@pytest.mark.thorough
def test_a_closed_connection_does_not_count_as_a_failure(postgres: PostgresServer, postgres_url: str) -> None:
    database = Database(postgres_url)
    close_connections(postgres)
    assert database.write(Failing(1)) == "done"
    database.close()


@pytest.mark.thorough
def test_a_connection_that_is_lost_in_a_transaction_is_made_again(postgres: PostgresServer, postgres_url: str) -> None:
    database = Database(postgres_url)
    pids = []

    def work(session: Session, now: float) -> int:
        pid: int = session.connection().exec_driver_sql("SELECT pg_backend_pid()").scalar_one()
        pids.append(pid)
        if len(pids) == 1:
            postgres.execute(f"SELECT pg_terminate_backend({pid}, 60000)")
        return int(session.connection().exec_driver_sql("SELECT 7").scalar_one())

    assert database.write(work) == 7
    assert len(set(pids)) == 2
    database.close()


@pytest.mark.thorough
async def test_a_postgres_server_that_stops_is_unavailable_until_it_is_back(
    postgres: PostgresServer, postgres_url: str, clock: Clock
) -> None:
    store = open_test_store(postgres_url, clock)
    job = await publish(store)
    postgres.stop()
    try:
        calls: list[Callable[[], Any]] = [
            lambda: store.get(job.id, OWNER),
            lambda: store.claim("a server", job.served_model, 1),
            lambda: store.renew({job.id: 1}, {}),
        ]
        for call in calls:
            with pytest.raises(UnavailableError):
                await call()
    finally:
        postgres.start()
    assert await store.get(job.id, OWNER) == job
    await store.close()


async def test_a_store_closes_while_calls_are_under_way(store_url: str, clock: Clock) -> None:
    store = open_test_store(store_url, clock)
    adds = [asyncio.create_task(store.add(new_job())) for _ in range(10)]
    await asyncio.sleep(0)
    await store.close()
    await asyncio.gather(*adds)
    with pytest.raises(UnavailableError, match="closed"):
        await store.counts(MODEL)


async def test_calls_may_come_from_several_event_loops(store: JobStore) -> None:
    job = await publish(store)
    elsewhere = await asyncio.to_thread(lambda: asyncio.run(store.get(job.id, OWNER)))
    assert elsewhere == await store.get(job.id, OWNER)
