"""Stores, clocks and jobs of the tests."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from vllm_omni.video_jobs.records import ClaimedJob, VideoJob, new_job_id
from vllm_omni.video_jobs.store import open_store
from vllm_omni.video_jobs.store.job_store import JobStore

LEASE_SECONDS = 30.0
TTL_SECONDS = 3600.0
OWNER = "a key's hash"
MODEL = "demo-video"

JOB = VideoJob(
    id="",
    owner=OWNER,
    model="video",
    served_model=MODEL,
    status="queued",
    progress=0,
    created_at=1000.0,
    started_at=None,
    completed_at=None,
    expires_at=None,
    request={"prompt": "a rocket", "params": {"seed": 7, "fps": 8.0}},
    shown={"size": "64x64", "seconds": "2.125"},
    priority=0,
    work_seconds=1.5,
    inputs=(),
    outputs={},
    checkpoint=None,
    remixed_from=None,
    idempotency_key=None,
    error_code=None,
    error_message=None,
    num_attempts=0,
)


class Clock:
    """Unix seconds that pass when a test says so."""

    def __init__(self, now: float = 1000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


def open_test_store(url: str, clock: Callable[[], float] | None, **limits: int) -> JobStore:
    return open_store(url, lease_seconds=LEASE_SECONDS, job_ttl_seconds=TTL_SECONDS, clock=clock, **limits)


def new_job(**fields: Any) -> VideoJob:
    job = replace(JOB, **fields)
    return job if job.id else replace(job, id=new_job_id(job.created_at))


UNKNOWN = new_job().id
"""Id of a job that no store has."""


async def publish(store: JobStore, **fields: Any) -> VideoJob:
    """A new job that can be claimed."""
    job = new_job(**fields)
    await store.add(job)
    await store.publish(job.id)
    return await store.get(job.id, job.owner)


async def claim_one(store: JobStore, server: str = "a server") -> ClaimedJob:
    (claimed,) = await store.claim(server, MODEL, 1)
    return claimed


async def start_one(store: JobStore, **fields: Any) -> ClaimedJob:
    """A new job that a server runs; no other waits."""
    job = await publish(store, **fields)
    claimed = await claim_one(store)
    assert claimed.job.id == job.id
    await store.note_started(job.id, claimed.fence)
    return claimed


async def run_program(name: str, *arguments: str) -> str:
    """Output of a program of this folder."""
    command = [sys.executable, "-m", f"tests.video_jobs.store.{name}", *arguments]
    done = await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout
