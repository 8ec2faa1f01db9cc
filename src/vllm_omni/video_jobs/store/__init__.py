"""Store of video jobs in a SQL database. SQLAlchemy is imported when a store is opened."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm_omni.video_jobs.store.job_store import JobStore

__all__ = ["check_job_store", "check_job_store_form", "open_store"]


def open_store(
    url: str,
    *,
    lease_seconds: float,
    job_ttl_seconds: float,
    max_jobs_per_key: int | None = None,
    max_jobs: int | None = None,
    clock: Callable[[], float] | None = None,
) -> JobStore:
    """Open the store at `url`, an SQLAlchemy URL of SQLite or PostgreSQL; make its folder and tables if needed.

    lease_seconds: time for which a claim holds unless it is renewed. job_ttl_seconds: time after which an ended job
    expires, and after which a waiting job fails that no server has begun. max_jobs_per_key: most unfinished jobs of
    one owner; max_jobs: most rows; None for no limit. clock: Unix seconds, for tests; by default the host's for
    SQLite and the database's for PostgreSQL, whose servers run on several hosts.
    Blocks while it connects. Raises ConfigError with one line that names --job-store.
    """
    from vllm_omni.video_jobs.store.database import Database
    from vllm_omni.video_jobs.store.job_store import JobStore
    from vllm_omni.video_jobs.store.limits import StoreLimits

    limits = StoreLimits(lease_seconds, job_ttl_seconds, max_jobs_per_key, max_jobs)
    return JobStore(Database(url, clock), limits)


def check_job_store(url: str) -> None:
    """Raise ConfigError unless the store at `url` can be opened; its folder and tables are made if needed. Blocks."""
    from vllm_omni.video_jobs.store.database import Database

    Database(url).close()


def check_job_store_form(url: str) -> None:
    """Raise ConfigError for a URL that no store has. Nothing is made or connected to."""
    from vllm_omni.video_jobs.store.urls import parse_store_url

    parse_store_url(url)
