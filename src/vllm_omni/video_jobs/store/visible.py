"""Queries of visible jobs: one job, pages of jobs, counts and places in the queue."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import and_, func, select, tuple_
from sqlalchemy.orm import Session, aliased

from vllm_omni.errors import InvalidRequestError, JobNotFoundError
from vllm_omni.video_jobs.records import JOB_STATUSES, JobStatus, VideoJob, creation_time, is_job_id
from vllm_omni.video_jobs.store.tables import JobRow, Stage, to_job

VISIBLE_STAGES: tuple[Stage, ...] = ("live", "ended")


def get(session: Session, now: float, *, job_id: str, owner: str) -> VideoJob:
    """Visible job of an owner. Raises JobNotFoundError."""
    row = session.get(JobRow, job_id) if is_job_id(job_id) else None
    if row is None or row.owner != owner or row.stage not in VISIBLE_STAGES:
        raise not_found(job_id)
    return to_job(row)


def page(
    session: Session, now: float, *, owner: str, after: str | None, limit: int, newest_first: bool
) -> tuple[list[VideoJob], bool]:
    """At most `limit` jobs behind the job `after`, and whether more follow.

    The id of `after` says its place, because its row may be deleted. Raises InvalidRequestError for no such id.
    """
    place = tuple_(JobRow.created_at, JobRow.id)
    query = select(JobRow).where(JobRow.owner == owner, JobRow.stage.in_(VISIBLE_STAGES))
    if after is not None:
        if not is_job_id(after):
            raise InvalidRequestError(f"after takes the id of a video, got {after!r:.80}", param="after")
        edge = tuple_(creation_time(after), after)
        query = query.where(place < edge if newest_first else place > edge)
    for column in (JobRow.created_at, JobRow.id):
        query = query.order_by(column.desc() if newest_first else column)
    rows = session.scalars(query.limit(limit + 1)).all()
    return [to_job(row) for row in rows[:limit]], len(rows) > limit


def counts(session: Session, now: float, *, served_model: str) -> dict[JobStatus, int]:
    """Number of visible jobs of each status."""
    visible = JobRow.stage.in_(VISIBLE_STAGES), JobRow.served_model == served_model
    query = select(JobRow.status, func.count()).where(*visible).group_by(JobRow.status)
    found: dict[str, int] = {status: number for status, number in session.execute(query)}  # noqa: C416  (rows, not pairs)
    return {status: found.get(status, 0) for status in JOB_STATUSES}


def queued_before(session: Session, now: float, *, job_ids: Sequence[str]) -> dict[str, tuple[int, float]]:
    """Number and work seconds of the jobs that nobody runs and that are claimed before each of some jobs, by its id.

    Ids of jobs that are not in the store are left out.
    """
    job = aliased(JobRow)
    is_before = and_(
        JobRow.stage == "live",
        JobRow.served_model == job.served_model,
        JobRow.lease_ends_at <= now,
        tuple_(JobRow.priority, JobRow.created_at, JobRow.id) < tuple_(job.priority, job.created_at, job.id),
    )
    query = (
        select(job.id, func.count(JobRow.id), func.coalesce(func.sum(JobRow.work_seconds), 0.0))
        .outerjoin(JobRow, is_before)
        .where(job.id.in_(job_ids))
        .group_by(job.id)
    )
    return {job_id: (number, float(seconds)) for job_id, number, seconds in session.execute(query)}


def not_found(job_id: str) -> JobNotFoundError:
    return JobNotFoundError(f"No video has the id {job_id!r:.80}.")
