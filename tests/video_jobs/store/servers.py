"""Program: servers that are killed, pause longer than their leases and give jobs back, until all jobs have ended.

Argument: the store's URL. Prints a line for each claim and for each completed job: the word, the job's id, the fence.
"""

from __future__ import annotations

import asyncio
import os
import random
import sys

from tests.video_jobs.store.stores import MODEL, TTL_SECONDS
from vllm_omni.errors import LeaseLostError
from vllm_omni.video_jobs.records import ClaimedJob
from vllm_omni.video_jobs.store import open_store
from vllm_omni.video_jobs.store.job_store import JobStore

NUM_SERVERS = 6
LEASE_SECONDS = 1.0
KILLED = 9


async def serve(url: str, seed: int) -> None:
    """Claim and run jobs until none is left."""
    store = open_store(url, lease_seconds=LEASE_SECONDS, job_ttl_seconds=TTL_SECONDS)
    fate = random.Random(seed)
    while await has_work(store):
        for claimed in await store.claim(f"server {seed}", MODEL, fate.randint(1, 4)):
            try:
                await run(store, claimed, fate.random())
            except LeaseLostError:
                continue
        await asyncio.sleep(0.01)
    await store.close()


async def run(store: JobStore, claimed: ClaimedJob, fate: float) -> None:
    job_id, fence = claimed.job.id, claimed.fence
    report("claimed", claimed)
    await store.note_started(job_id, fence)
    if fate < 0.05:
        os._exit(KILLED)
    if fate < 0.1:
        await asyncio.sleep(1.5 * LEASE_SECONDS)
    elif fate < 0.2:
        await store.release(job_id, fence)
        return
    elif fate < 0.5:
        await store.note_checkpoint(job_id, fence, f"{job_id}/{fence}/checkpoint")
    await store.complete(job_id, fence, {"video": str(fence)})
    report("completed", claimed)


def report(word: str, claimed: ClaimedJob) -> None:
    os.write(1, f"{word} {claimed.job.id} {claimed.fence}\n".encode())


async def has_work(store: JobStore) -> bool:
    counts = await store.counts(MODEL)
    return counts["queued"] + counts["in_progress"] > 0


def main(url: str) -> None:
    """Run servers; one that was killed is followed by another."""
    running: set[int] = set()
    num_started = 0
    while True:
        while len(running) < NUM_SERVERS:
            num_started += 1
            child = os.fork()
            if child == 0:
                asyncio.run(serve(url, seed=num_started))
                os._exit(0)
            running.add(child)
        ended, status = os.wait()
        running.remove(ended)
        code = os.waitstatus_to_exitcode(status)
        assert code in (0, KILLED), f"a server ended with exit code {code}"
        if code == 0:
            break  # no work is left
    for _ in running:
        os.wait()


if __name__ == "__main__":
    main(sys.argv[1])
