"""Program: for each point in the life of a job, a process ends there without any cleaning up.

Arguments: the store's URL and the folder of the files. Prints a line for each point: its name and the job's id.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

from sqlalchemy.orm import Session

from tests.video_jobs.store.files import NAMES, delete_files, write_files
from tests.video_jobs.store.stores import OWNER, Clock, new_job, open_test_store, publish, start_one
from vllm_omni.video_jobs.store.job_store import JobStore

Point = Callable[[JobStore, Path, str], Awaitable[None]]


def crash(session: Session) -> None:
    os._exit(9)


def crash_before_commit() -> None:
    """End the process in the next transaction, after its statements."""
    Session.commit = crash  # type: ignore[assignment,method-assign]


async def add_in_transaction(store: JobStore, media: Path, job_id: str) -> None:
    crash_before_commit()
    await store.add(new_job(id=job_id))


async def add(store: JobStore, media: Path, job_id: str) -> None:
    await store.add(new_job(id=job_id))


async def write_one_input(store: JobStore, media: Path, job_id: str) -> None:
    await store.add(new_job(id=job_id))
    write_files(media, job_id, NAMES[:1])


async def publish_in_transaction(store: JobStore, media: Path, job_id: str) -> None:
    await store.add(new_job(id=job_id))
    write_files(media, job_id)
    crash_before_commit()
    await store.publish(job_id)


async def delete_in_first_transaction(store: JobStore, media: Path, job_id: str) -> None:
    await publish(store, id=job_id)
    write_files(media, job_id)
    crash_before_commit()
    await store.begin_delete(job_id, OWNER)


async def begin_delete(store: JobStore, media: Path, job_id: str) -> None:
    await publish(store, id=job_id)
    write_files(media, job_id)
    await store.begin_delete(job_id, OWNER)


async def delete_one_file(store: JobStore, media: Path, job_id: str) -> None:
    await begin_delete(store, media, job_id)
    (media / job_id / NAMES[0]).unlink()


async def delete_in_last_transaction(store: JobStore, media: Path, job_id: str) -> None:
    await begin_delete(store, media, job_id)
    delete_files(media, job_id)
    crash_before_commit()
    await store.end_delete(job_id)


async def end_before_transaction(store: JobStore, media: Path, job_id: str) -> None:
    await start_one(store, id=job_id)
    write_files(media, job_id)


async def end_in_transaction(store: JobStore, media: Path, job_id: str) -> None:
    claimed = await start_one(store, id=job_id)
    write_files(media, job_id)
    crash_before_commit()
    await store.complete(job_id, claimed.fence, {})


async def end_after_transaction(store: JobStore, media: Path, job_id: str) -> None:
    claimed = await start_one(store, id=job_id)
    write_files(media, job_id)
    await store.complete(job_id, claimed.fence, {})


POINTS: dict[str, Point] = {
    # The jobs of these are claimed while no other waits.
    "end: before the transaction": end_before_transaction,
    "end: in the transaction": end_in_transaction,
    "end: after the transaction": end_after_transaction,
    "add: in the transaction": add_in_transaction,
    "add: after it": add,
    "publish: one input is stored": write_one_input,
    "publish: in the transaction": publish_in_transaction,
    "delete: in the first transaction": delete_in_first_transaction,
    "delete: after it": begin_delete,
    "delete: one file is removed": delete_one_file,
    "delete: in the last transaction": delete_in_last_transaction,
}


async def run_to(point: Point, url: str, media: Path, job_id: str) -> None:
    await point(open_test_store(url, Clock()), media, job_id)
    os._exit(9)


def main(url: str, media: Path) -> None:
    media.mkdir()
    for name, point in POINTS.items():
        job_id = new_job().id
        child = os.fork()
        if child == 0:
            asyncio.run(run_to(point, url, media, job_id))
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert code == 9, f"{name} ended with exit code {code}"
        print(name, job_id)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
