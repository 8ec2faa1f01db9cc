"""Begin and end of rows: creation in two steps, deletion in two steps, expiry."""

from __future__ import annotations

from typing import Any

from sqlalchemy import case, delete, func, literal, select, update
from sqlalchemy.orm import Session

from vllm_omni.errors import StoreFullError, TooManyJobsError
from vllm_omni.video_jobs.records import VideoJob, is_job_id
from vllm_omni.video_jobs.store.leases import failure
from vllm_omni.video_jobs.store.limits import StoreLimits
from vllm_omni.video_jobs.store.migrations import lock_store
from vllm_omni.video_jobs.store.tables import JobRow, changes_row, to_job, to_row
from vllm_omni.video_jobs.store.visible import not_found

CREATION_SECONDS = 600.0
"""Time in which a job's input pictures must be stored; a row that is `creating` for longer is abandoned."""


def add(session: Session, now: float, *, job: VideoJob, limits: StoreLimits) -> None:
    """Add an invisible row. Raises TooManyJobsError and StoreFullError."""
    lock_store(session)  # or two servers would both take the last place
    if limits.max_jobs is not None and _count(session) >= limits.max_jobs:
        raise StoreFullError(
            f"The store of video jobs is full: it takes {limits.max_jobs} jobs; delete some or try later."
        )
    if limits.max_jobs_per_key is not None:
        unfinished = _count(session, JobRow.owner == job.owner, JobRow.stage.in_(("creating", "live")))
        if unfinished >= limits.max_jobs_per_key:
            raise TooManyJobsError(
                f"Got {unfinished} unfinished videos already; an API key may have {limits.max_jobs_per_key}. "
                "Wait until one ends, or delete one.",
                retry_after=5.0,
            )
    row = to_row(job, "creating", now + CREATION_SECONDS)
    row.expires_at = now + limits.job_ttl_seconds
    session.add(row)


def publish(session: Session, now: float, *, job_id: str) -> None:
    """Make a created job visible, and claimable unless it was added as completed. Raises JobNotFoundError."""
    stage = case((JobRow.completed_at.is_(None), "live"), else_="ended")
    creating = update(JobRow).where(JobRow.id == job_id, JobRow.stage == "creating")
    if not changes_row(session, creating.values(stage=stage, lease_ends_at=0.0)):
        raise not_found(job_id)


def begin_delete(session: Session, now: float, *, job_id: str, owner: str) -> VideoJob:
    """Make a job invisible. Raises JobNotFoundError."""
    row = session.get(JobRow, job_id, with_for_update=True) if is_job_id(job_id) else None
    if row is None or row.owner != owner or row.stage == "deleting":
        raise not_found(job_id)
    if row.stage == "creating":
        row.lease_ends_at = 0.0  # the creator itself deletes it
    row.stage = "deleting"
    return to_job(row)


def end_delete(session: Session, now: float, *, job_id: str) -> bool:
    """Remove the row, unless a server may still write files of the job: until its lease ends or is released."""
    conditions = (JobRow.id == job_id, JobRow.stage == "deleting", JobRow.lease_ends_at <= now)
    return changes_row(session, delete(JobRow).where(*conditions))


def unfinished_deletes(session: Session, now: float, *, limits: StoreLimits) -> list[str]:
    """Ids of jobs to be deleted: deletes that were cut off, ended jobs that expired, creations that were cut off."""
    reason = f"No server made this video within {limits.job_ttl_seconds:g} s."
    too_old = failure(now, limits, "expired", reason)
    too_old["error_message"] = case(
        (JobRow.error_message.is_(None), reason), else_=literal(f"{reason} The last refusal: ") + JobRow.error_message
    )
    _change(session, (JobRow.stage == "live", JobRow.expires_at <= now, JobRow.lease_ends_at <= now), too_old)
    gone = {"stage": "deleting"}
    _change(session, (JobRow.stage == "ended", JobRow.expires_at <= now), gone)
    _change(session, (JobRow.stage == "creating", JobRow.lease_ends_at <= now), gone)
    return list(session.scalars(select(JobRow.id).where(JobRow.stage == "deleting")))


def _count(session: Session, *conditions: Any) -> int:
    return session.scalars(select(func.count()).select_from(JobRow).where(*conditions)).one()


def _change(session: Session, conditions: tuple[Any, ...], values: dict[str, Any]) -> None:
    statement = update(JobRow).where(*conditions).values(**values)
    session.execute(statement.execution_options(synchronize_session=False))
