"""Limits of a store."""

from __future__ import annotations

from dataclasses import dataclass

CREATION_SECONDS = 600.0
"""Time in which a job's input pictures must be stored; a row that is `creating` for longer is abandoned."""


@dataclass(frozen=True)
class StoreLimits:
    """Times and numbers that bound the jobs of a store."""

    lease_seconds: float
    """Time for which a claim holds unless it is renewed."""
    job_ttl_seconds: float
    """Time for which an ended job is kept, and for which a waiting job may stay without a server that begins it."""
    max_jobs_per_key: int | None
    """Most unfinished jobs of one owner; None for no limit."""
    max_jobs: int | None
    """Most rows; None for no limit."""
