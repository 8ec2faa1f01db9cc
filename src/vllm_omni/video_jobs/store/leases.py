"""Claims of jobs: leases, and the writes of the server that runs a job."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from sqlalchemy import case, func, select, update
from sqlalchemy.orm import Session

from vllm_omni.errors import LeaseLostError
from vllm_omni.video_jobs.records import MAX_ATTEMPTS, ClaimedJob
from vllm_omni.video_jobs.store.limits import StoreLimits
from vllm_omni.video_jobs.store.tables import JobRow, changes_row, to_claim


def claim(
    session: Session,
    now: float,
    *,
    server: str,
    served_model: str,
    limit: int,
    skip: Collection[str],
    limits: StoreLimits,
) -> list[ClaimedJob]:
    """Claim at most `limit` jobs that wait or whose lease has ended: smallest priority first, then oldest.

    skip: ids of jobs that are not claimed.

    A job fails instead if `MAX_ATTEMPTS` servers died one after the other without storing a checkpoint of it.
    """
    claimed: list[JobRow] = []
    claimable = [JobRow.stage == "live", JobRow.served_model == served_model, JobRow.lease_ends_at <= now]
    if skip:
        claimable.append(JobRow.id.not_in(skip))
    while len(claimed) < limit:
        rows = session.scalars(
            select(JobRow)
            .where(*claimable)
            .order_by(JobRow.priority, JobRow.created_at, JobRow.id)
            .limit(limit - len(claimed))
            .with_for_update(skip_locked=True)  # on PostgreSQL; on SQLite the transaction is the only writer
        ).all()
        if not rows:
            break
        for row in rows:
            if row.num_stalled_attempts >= MAX_ATTEMPTS:
                set_values(row, failure(now, limits, "too_many_attempts", _too_many_attempts(row)))
                continue
            row.server, row.fence = server, row.fence + 1
            row.num_attempts, row.num_stalled_attempts = row.num_attempts + 1, row.num_stalled_attempts + 1
            row.lease_ends_at = now + limits.lease_seconds
            claimed.append(row)
        session.flush()
    return [to_claim(row) for row in claimed]


def renew(
    session: Session,
    now: float,
    *,
    claims: Mapping[str, int],
    progress: Mapping[str, int],
    limits: StoreLimits,
) -> set[str]:
    """Renew the leases of `claims` (job id -> fence) and store the progress. Returns the ids of lost claims.

    A job with progress has started: its start may not be noted yet, because another thread notes it.
    """
    lost = set()
    for job_id in sorted(claims):  # in one order on all servers, so that none waits for another in a circle
        # Claims alone do not keep a job: no server may be able to begin it.
        kept_until = case((JobRow.status == "in_progress", now + limits.job_ttl_seconds), else_=JobRow.expires_at)
        values: dict[str, Any] = {"lease_ends_at": now + limits.lease_seconds, "expires_at": kept_until}
        if (percent := progress.get(job_id)) is not None:
            values |= _start(now, limits)
            values["progress"] = case((JobRow.progress < percent, percent), else_=JobRow.progress)
        if not _update_claimed(session, job_id, claims[job_id], values):
            lost.add(job_id)
    return lost


def note_started(session: Session, now: float, *, job_id: str, fence: int, limits: StoreLimits) -> None:
    write_claimed(session, job_id, fence, _start(now, limits))


def note_checkpoint(session: Session, now: float, *, job_id: str, fence: int, key: str) -> str | None:
    """Store the media key of the newest checkpoint and return the one before. The job has made progress."""
    row = session.scalars(
        select(JobRow).where(JobRow.id == job_id, JobRow.fence == fence, JobRow.stage == "live").with_for_update()
    ).one_or_none()
    if row is None:
        raise _lost(job_id)
    old, row.checkpoint = row.checkpoint, key
    row.num_stalled_attempts = 1  # this one, until it is over
    return None if old == key else old


def complete(
    session: Session,
    now: float,
    *,
    job_id: str,
    fence: int,
    outputs: Mapping[str, str],
    shown: Mapping[str, Any] | None,
    limits: StoreLimits,
) -> None:
    values = {"status": "completed", "progress": 100, "outputs": dict(outputs), **ending(now, limits)}
    if shown is not None:
        values["shown"] = dict(shown)
    write_claimed(session, job_id, fence, values)


def fail(
    session: Session, now: float, *, job_id: str, fence: int, code: str, message: str, limits: StoreLimits
) -> None:
    write_claimed(session, job_id, fence, failure(now, limits, code, message))


def write_claimed(session: Session, job_id: str, fence: int, values: Mapping[str, Any]) -> None:
    """Set `values` in the row of a claimed job. Raises LeaseLostError if the claim does not hold any more."""
    if not _update_claimed(session, job_id, fence, values):
        raise _lost(job_id)


def release(session: Session, now: float, *, job_id: str, fence: int, refusal: str | None = None) -> None:
    """End a claim so that it counts neither as an attempt nor for later writes. A job under deletion is let go.

    refusal: reason why its server cannot run the job; it is told if the job expires before one begins it.
    """
    held = update(JobRow).where(JobRow.id == job_id, JobRow.fence == fence, JobRow.stage.in_(("live", "deleting")))
    values: dict[str, Any] = {"fence": JobRow.fence + 1, "lease_ends_at": 0.0}
    if refusal is not None:
        values["error_message"] = refusal
    attempts = {name: getattr(JobRow, name) - 1 for name in ("num_attempts", "num_stalled_attempts")}
    if not changes_row(session, held.values(**values, **attempts)):
        raise _lost(job_id)


def failure(now: float, limits: StoreLimits, code: str, message: str) -> dict[str, Any]:
    """Values of a job that fails now."""
    return {"status": "failed", "error_code": code, "error_message": message, **ending(now, limits)}


def ending(now: float, limits: StoreLimits) -> dict[str, Any]:
    """Values of a job that ends now."""
    # The fence stays: a second write of the same claim is refused by the stage.
    times = {"completed_at": now, "expires_at": now + limits.job_ttl_seconds, "lease_ends_at": 0.0}
    return {"stage": "ended", "checkpoint": None, **times}


def set_values(row: JobRow, values: Mapping[str, Any]) -> None:
    for name, value in values.items():
        setattr(row, name, value)


def _start(now: float, limits: StoreLimits) -> dict[str, Any]:
    """Values of a job that runs; the first start counts."""
    started_at = func.coalesce(JobRow.started_at, now)
    return {
        "status": "in_progress",
        "started_at": started_at,
        "expires_at": now + limits.job_ttl_seconds,
        "error_message": None,
    }


def _update_claimed(session: Session, job_id: str, fence: int, values: Mapping[str, Any]) -> bool:
    held = update(JobRow).where(JobRow.id == job_id, JobRow.fence == fence, JobRow.stage == "live")
    return changes_row(session, held.values(**values))


def _lost(job_id: str) -> LeaseLostError:
    return LeaseLostError(f"{job_id}: another server has claimed the job, or it was deleted")


def _too_many_attempts(row: JobRow) -> str:
    return f"{row.num_stalled_attempts} servers in a row ended while they made this video; it is not tried again."
