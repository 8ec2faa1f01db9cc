"""Queries read indexes: their time does not grow with the jobs that they do not return."""

from __future__ import annotations

import sqlite3
from collections.abc import Awaitable, Callable, Iterator
from contextlib import closing
from dataclasses import asdict
from typing import Any

import psycopg
import pytest
from sqlalchemy import Engine, event, insert

from testbed.postgres import PostgresServer
from tests.video_jobs.store.stores import MODEL, OWNER, Clock, new_job, open_test_store
from vllm_omni.video_jobs.records import VideoJob
from vllm_omni.video_jobs.store.database import Database
from vllm_omni.video_jobs.store.job_store import JobStore
from vllm_omni.video_jobs.store.tables import JobRow

NUM_JOBS = 10_000
JOB: VideoJob = new_job(created_at=100.0)
OTHER = new_job(created_at=100.0)

CALLS: dict[str, tuple[Callable[[JobStore], Awaitable[object]], set[str]]] = {
    "claim": (lambda store: store.claim("a server", MODEL, 2), {"video_jobs_claims"}),
    "queued_before": (lambda store: store.queued_before([JOB.id, OTHER.id]), {"video_jobs_claims"}),
    "first page": (lambda store: store.list(OWNER, None, 20, True), {"video_jobs_pages"}),
    "next page": (lambda store: store.list(OWNER, JOB.id, 20, True), {"video_jobs_pages"}),
    "next page, oldest first": (lambda store: store.list(OWNER, JOB.id, 20, False), {"video_jobs_pages"}),
    "counts": (lambda store: store.counts(MODEL), {"video_jobs_counts"}),
    "add with a key": (
        lambda store: store.add(new_job(idempotency_key="a key")),
        {"video_jobs_keys", "video_jobs_quotas"},
    ),
    "add": (lambda store: store.add(OTHER), {"video_jobs_quotas"}),
    "unfinished_deletes": (lambda store: store.unfinished_deletes(), {"video_jobs_expiry"}),
}
"""Calls whose queries return or count more than one row, and the indexes that they read besides that of the ids."""
COUNT_OF_ALL = "SELECT count(*) AS count_1 \nFROM video_jobs"
"""Query that needs every row."""


class Recorder:
    """Statements that the stores execute, with their parameters."""

    def __init__(self) -> None:
        self.statements: list[tuple[str, Any]] = []

    def __call__(self, connection: object, cursor: object, statement: str, parameters: Any, *rest: object) -> None:
        if statement.lstrip().startswith(("SELECT", "UPDATE", "DELETE")) and "video_jobs" in statement:
            one = parameters[0] if isinstance(parameters, list) else parameters  # a list: one for each row
            self.statements.append((statement, one))


async def queries_of(url: str, call: Callable[[JobStore], Awaitable[object]]) -> list[tuple[str, Any]]:
    """Statements of a call, of which a plan can be asked."""
    store = open_test_store(url, Clock(), max_jobs=2 * NUM_JOBS, max_jobs_per_key=NUM_JOBS)
    recorder = Recorder()
    event.listen(Engine, "before_cursor_execute", recorder)
    try:
        await call(store)
    finally:
        event.remove(Engine, "before_cursor_execute", recorder)
        await store.close()
    return [(statement, values) for statement, values in recorder.statements if statement != COUNT_OF_ALL]


def fill(url: str) -> None:
    """Add many ended jobs of 100 owners, and a tenth as many that wait or run."""
    values = asdict(JOB)
    rows = [
        {
            **values,
            "id": new_job().id,
            "owner": OWNER if number % 100 == 0 else str(number % 100),
            "created_at": float(number),
            "priority": number % 3,
            "stage": "live" if number % 10 == 0 else "ended",
            "status": "queued" if number % 10 == 0 else "completed",
            "expires_at": 1e9 + number,
            "fence": 0,
            "num_stalled_attempts": 0,
            "lease_ends_at": 1e9 if number % 1000 == 0 else 0.0,
        }
        for number in range(NUM_JOBS)
    ]
    rows.append({**rows[100], "id": JOB.id})
    database = Database(url)
    database.write(lambda session, now: session.execute(insert(JobRow), rows))
    database.close()


@pytest.mark.parametrize("name", CALLS)
async def test_sqlite_reads_indexes(sqlite_url: str, name: str) -> None:
    call, indexes = CALLS[name]
    await publish_job(sqlite_url)
    queries = await queries_of(sqlite_url, call)
    plans = []
    with closing(sqlite3.connect(sqlite_url.removeprefix("sqlite:///"))) as connection:
        for statement, values in queries:
            plan = [row[3] for row in connection.execute(f"EXPLAIN QUERY PLAN {statement}", values)]
            assert not [step for step in plan if step.startswith("SCAN") or "FOR ORDER BY" in step], (statement, plan)
            plans += plan
    assert all(any(f"INDEX {index} " in step for step in plans) for index in indexes), plans


@pytest.fixture(scope="module")
def full_postgres_url(postgres: PostgresServer) -> Iterator[str]:
    """A database with many jobs, whose numbers the planner knows."""
    with postgres.database() as name:
        fill(postgres.url(name))
        postgres.execute("VACUUM ANALYZE video_jobs", name)
        yield postgres.url(name)


@pytest.mark.thorough
@pytest.mark.parametrize("name", CALLS)
async def test_postgres_reads_indexes(full_postgres_url: str, name: str) -> None:
    call, indexes = CALLS[name]
    queries = await queries_of(full_postgres_url, call)
    plans = ""
    with psycopg.connect(full_postgres_url) as connection:
        for statement, values in queries:
            plan = "\n".join(str(row[0]) for row in connection.execute(f"EXPLAIN {statement}".encode(), values))
            assert "Seq Scan" not in plan, plan
            assert "Sort Key: video_jobs" not in plan, plan
            plans += plan
    assert all(f" {index} " in plans for index in indexes), plans


async def publish_job(url: str) -> None:
    store = open_test_store(url, Clock())
    await store.add(JOB)
    await store.publish(JOB.id)
    await store.close()
