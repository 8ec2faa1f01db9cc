"""Tables of the store."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, Literal, cast

from sqlalchemy import JSON, BigInteger, Delete, Double, Index, Text, Update
from sqlalchemy.engine import Dialect
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column
from sqlalchemy.types import TypeDecorator

from vllm_omni.video_jobs.records import ClaimedJob, JobStatus, VideoJob

Stage = Literal["creating", "live", "ended", "deleting"]
"""Stage of a row: `creating` and `deleting` rows are invisible; `live` rows are run, `ended` rows are kept."""


class AnyText(TypeDecorator[str]):
    """Text in which characters that a database refuses are escaped: NUL and lone surrogates."""

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: str | None, dialect: Dialect) -> str | None:
        return None if value is None else value.encode(errors="backslashreplace").decode().replace("\0", "\\x00")


class StoreTable(DeclarativeBase):
    """Base of the tables."""

    type_annotation_map = {  # noqa: RUF012  (SQLAlchemy's name)
        str: AnyText,
        int: BigInteger,
        float: Double,
        dict[str, Any]: JSON,
        list[str]: JSON,
    }


class JobRow(StoreTable):
    """A row: the fields of a `VideoJob`, its stage and its claim."""

    __tablename__ = "video_jobs"

    id: Mapped[str] = mapped_column(primary_key=True)
    owner: Mapped[str]
    model: Mapped[str]
    served_model: Mapped[str]
    status: Mapped[str]
    progress: Mapped[int]
    created_at: Mapped[float]
    started_at: Mapped[float | None]
    completed_at: Mapped[float | None]
    expires_at: Mapped[float | None]
    request: Mapped[dict[str, Any]]
    shown: Mapped[dict[str, Any]]
    priority: Mapped[int]
    work_seconds: Mapped[float]
    inputs: Mapped[list[str]]
    outputs: Mapped[dict[str, Any]]
    checkpoint: Mapped[str | None]
    remixed_from: Mapped[str | None]
    idempotency_key: Mapped[str | None]
    """None once the row is `deleting`: the key may be used again."""
    error_code: Mapped[str | None]
    error_message: Mapped[str | None]
    num_attempts: Mapped[int]

    stage: Mapped[str]
    server: Mapped[str | None]
    """Server that claimed the job last."""
    fence: Mapped[int]
    lease_ends_at: Mapped[float]
    """End of the claim, or of the time in which the creator of a `creating` row publishes it; 0 without a claim."""

    num_stalled_attempts: Mapped[int]
    """Claims since the newest checkpoint, the one that stored it included, without those that a server gave back."""

    __table_args__ = (
        # The order of claims. The last two columns let `queued_before` read the index alone.
        Index(
            "video_jobs_claims",
            "stage",
            "served_model",
            "priority",
            "created_at",
            "id",
            "lease_ends_at",
            "work_seconds",
        ),
        Index("video_jobs_pages", "owner", "created_at", "id"),
        Index("video_jobs_quotas", "owner", "stage"),
        Index("video_jobs_keys", "owner", "idempotency_key", unique=True),
        Index("video_jobs_counts", "stage", "served_model", "status"),
        Index("video_jobs_expiry", "stage", "expires_at"),
    )


class VersionRow(StoreTable):
    """One row: the version of the tables."""

    __tablename__ = "video_jobs_version"

    version: Mapped[int] = mapped_column(primary_key=True)


_FIELDS = tuple(field.name for field in fields(VideoJob))


def to_row(job: VideoJob, stage: Stage, lease_ends_at: float) -> JobRow:
    """Row of a new job, which nobody has claimed."""
    values = {name: getattr(job, name) for name in _FIELDS}
    for name in ("request", "shown", "outputs"):
        values[name] = dict(values[name])
    values["inputs"] = list(job.inputs)
    return JobRow(**values, stage=stage, server=None, fence=0, lease_ends_at=lease_ends_at, num_stalled_attempts=0)


def to_job(row: JobRow) -> VideoJob:
    """Job of a row."""
    values = {name: getattr(row, name) for name in _FIELDS}
    values["status"] = cast(JobStatus, row.status)
    values["inputs"] = tuple(row.inputs)
    return VideoJob(**values)


def to_claim(row: JobRow) -> ClaimedJob:
    """Claim of a row."""
    return ClaimedJob(to_job(row), row.fence)


def changes_row(session: Session, statement: Update | Delete) -> bool:
    """Execute a statement on the row of one job, and return whether the row met its conditions."""
    statement = statement.execution_options(synchronize_session=False)
    return session.scalars(statement.returning(JobRow.id)).one_or_none() is not None
