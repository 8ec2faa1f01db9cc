"""Files of jobs, as a server writes and removes them."""

from __future__ import annotations

import shutil
from pathlib import Path

from vllm_omni.video_jobs.store.job_store import JobStore

NAMES = ("0.png", "1.png")


def write_files(media: Path, job_id: str, names: tuple[str, ...] = NAMES) -> None:
    (media / job_id).mkdir(parents=True, exist_ok=True)
    for name in names:
        (media / job_id / name).touch()


def delete_files(media: Path, job_id: str) -> None:
    shutil.rmtree(media / job_id, ignore_errors=True)


async def sweep(store: JobStore, media: Path) -> None:
    """Finish all deletes, as every server does now and then."""
    for job_id in await store.unfinished_deletes():
        delete_files(media, job_id)
        await store.end_delete(job_id)
