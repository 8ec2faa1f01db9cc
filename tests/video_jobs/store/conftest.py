"""Stores of the tests."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from vllm_omni.video_jobs.store import open_store
from vllm_omni.video_jobs.store.job_store import JobStore


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[JobStore]:
    store = open_store(f"sqlite:///{tmp_path}/jobs.db", lease_seconds=30, job_ttl_seconds=3600)
    yield store
    await store.close()
