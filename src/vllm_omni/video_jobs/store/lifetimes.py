"""Begin and end of rows: creation in two steps, deletion in two steps, expiry."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from sqlalchemy import case, delete, func, literal, select, update
from sqlalchemy.orm import Session

from vllm_omni.errors import StoreFullError, TooManyJobsError, UnavailableError
from vllm_omni.video_jobs.records import VideoJob, is_job_id
from vllm_omni.video_jobs.store.leases import failure, set_values
from vllm_omni.video_jobs.store.limits import CREATION_SECONDS, StoreLimits
from vllm_omni.video_jobs.store.migrations import lock_store
from vllm_omni.video_jobs.store.tables import JobRow, changes_row, to_job, to_row
from vllm_omni.video_jobs.store.visible import VISIBLE_STAGES, not_found

_DELETING: Mapping[str, Any] = {"stage": "deleting", "idempotency_key": None}
"""Values of a job whose deletion begins."""


def add(session: Session, now: float, *, job: VideoJob, limits: StoreLimits) -> VideoJob | None:
    """Add an invisible row, or return the owner's job of the same idempotency key.

    Raises TooManyJobsError and StoreFullError, but not for a job that is completed already, and UnavailableError while
    a job of the same key is being made.
    """
    lock_store(session)  # or two servers would both take the last place, or the same key
    if job.idempotency_key is not None and (earlier := _job_of_key(session, job)) is not None:
        return earlier
    is_completed = job.completed_at is not None
    if limits.max_jobs is not None and _count(session) >= limits.max_jobs:
        has_room = _remove_oldest_of_largest(session, None if is_completed else job.owner)
        if not has_room and not is_completed:
            raise StoreFullError(
                f"The store of video jobs is full: it takes {limits.max_jobs} jobs; delete some or try later."
            )
    if limits.max_jobs_per_key is not None and not is_completed:
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
    return None


def publish(session: Session, now: float, *, job_id: str) -> None:
    """Make a created job visible, and claimable unless it was added as completed. Raises JobNotFoundError."""
    stage = case((JobRow.completed_at.is_(None), "live"), else_="ended")
    creating = update(JobRow).where(JobRow.id == job_id, JobRow.stage == "creating")
    if not changes_row(session, creating.values(stage=stage, lease_ends_at=0.0)):
        raise not_found(job_id)


def begin_delete(session: Session, now: float, *, job_id: str, owner: str) -> VideoJob:
    """Make a job invisible. Raises JobNotFoundError."""
    row = session.get(JobRow, job_id, with_for_update=True) if is_job_id(job_id) else None
    if row is None or row.owner != owner or row.stage not in VISIBLE_STAGES:
        raise not_found(job_id)
    deleted = to_job(row)
    set_values(row, _DELETING)
    return deleted


def abandon(session: Session, now: float, *, job: VideoJob) -> None:
    """Begin to delete a job that could not be made.

    A sweep may have removed its row already. Then files may have been written after it, so the row comes back until
    they are removed, too.
    """
    row = session.get(JobRow, job.id, with_for_update=True)
    if row is None:
        session.add(to_row(replace(job, idempotency_key=None), "deleting", 0.0))
        return
    if row.stage == "creating":
        row.lease_ends_at = 0.0  # nobody but its creator writes files
    set_values(row, _DELETING)


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
    _change(session, (JobRow.stage == "ended", JobRow.expires_at <= now), _DELETING)
    _change(session, (JobRow.stage == "creating", JobRow.lease_ends_at <= now), _DELETING)
    return list(session.scalars(select(JobRow.id).where(JobRow.stage == "deleting")))


def _remove_oldest_of_largest(session: Session, newcomer: str | None) -> bool:
    """Begin to delete the oldest ended job of the owner who keeps most of them; return whether there was one.

    newcomer: owner who needs the place. Only an owner who keeps more ended jobs than the newcomer has jobs gives it.
    """
    kept = func.count()
    query = select(JobRow.owner, kept).where(JobRow.stage == "ended").group_by(JobRow.owner).order_by(kept.desc())
    largest = session.execute(query.limit(1)).one_or_none()
    if largest is None or (newcomer is not None and largest[1] <= _count(session, JobRow.owner == newcomer)):
        return False
    oldest = select(JobRow).where(JobRow.owner == largest[0], JobRow.stage == "ended").order_by(JobRow.completed_at)
    session.scalars(oldest.limit(1)).one().stage = "deleting"
    return True


def _count(session: Session, *conditions: Any) -> int:
    return session.scalars(select(func.count()).select_from(JobRow).where(*conditions)).one()


def _job_of_key(session: Session, job: VideoJob) -> VideoJob | None:
    """Job of the same owner and idempotency key. Raises UnavailableError if it is not published yet."""
    query = select(JobRow).where(JobRow.owner == job.owner, JobRow.idempotency_key == job.idempotency_key)
    row = session.scalars(query).one_or_none()
    if row is not None and row.stage == "creating":
        raise UnavailableError(
            f"The job of Idempotency-Key {job.idempotency_key!r:.80} is being made; repeat the request.",
            retry_after=1.0,
        )
    return None if row is None else to_job(row)


def _change(session: Session, conditions: tuple[Any, ...], values: Mapping[str, Any]) -> None:
    statement = update(JobRow).where(*conditions).values(**values)
    session.execute(statement.execution_options(synchronize_session=False))
