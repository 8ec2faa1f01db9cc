"""Version of the tables."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import pytest
from sqlalchemy import Engine, create_engine, text
from sqlalchemy.orm import Session

from tests.video_jobs.store.stores import OWNER, Clock, open_test_store, publish
from vllm_omni.errors import ConfigError
from vllm_omni.video_jobs.store import check_job_store
from vllm_omni.video_jobs.store.migrations import MIGRATIONS, VERSION, upgrade


@pytest.fixture
def engine(store_url: str) -> Iterator[Engine]:
    engine = create_engine(store_url.replace("postgresql:", "postgresql+psycopg:"))
    yield engine
    engine.dispose()


def run(engine: Engine, statement: str) -> None:
    with engine.begin() as connection:
        connection.execute(text(statement))


def version_of(engine: Engine) -> int:
    with engine.connect() as connection:
        version: int = connection.execute(text("SELECT version FROM video_jobs_version")).scalar_one()
        return version


def test_each_version_has_a_migration_to_the_next() -> None:
    assert sorted(MIGRATIONS) == list(range(1, VERSION))


async def test_an_older_store_is_brought_up_to_date_and_keeps_its_jobs(store_url: str, engine: Engine) -> None:
    store = open_test_store(store_url, Clock())
    job = await publish(store)
    migrations = {
        VERSION: ["ALTER TABLE video_jobs ADD COLUMN colour TEXT", "UPDATE video_jobs SET colour = 'red'"],
        VERSION + 1: ["ALTER TABLE video_jobs DROP COLUMN colour"],
    }
    later = partial(upgrade, migrations=migrations, now=0.0)
    with Session(engine) as session, session.begin():
        later(session, version=VERSION + 1)
        assert session.execute(text("SELECT colour FROM video_jobs")).scalar_one() == "red"
    with Session(engine) as session, session.begin():
        later(session, version=VERSION + 2)
    assert version_of(engine) == VERSION + 2
    assert await store.get(job.id, OWNER) == job
    await store.close()


def test_a_migration_that_fails_changes_nothing(store_url: str, engine: Engine) -> None:
    check_job_store(store_url)
    with Session(engine) as session, pytest.raises(Exception, match="nonsense"), session.begin():
        upgrade(session, 0.0, VERSION + 1, {VERSION: ["nonsense"]})
    assert version_of(engine) == VERSION


def test_a_newer_store_is_refused(store_url: str, engine: Engine) -> None:
    check_job_store(store_url)
    run(engine, f"UPDATE video_jobs_version SET version = {VERSION + 1}")
    with pytest.raises(ConfigError, match=rf"^--job-store .*has version {VERSION + 1}, .* takes up to {VERSION}$"):
        check_job_store(store_url)


def test_a_table_of_another_program_is_refused(store_url: str, engine: Engine) -> None:
    run(engine, "CREATE TABLE video_jobs (id INTEGER)")
    with pytest.raises(ConfigError, match=r"^--job-store .*its table video_jobs belongs to another program"):
        check_job_store(store_url)
