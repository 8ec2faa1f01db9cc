"""Program: 8 processes open the store of a URL at the same time and claim all jobs. Prints a line of ids for each."""

from __future__ import annotations

import asyncio
import os
import sys

from tests.video_jobs.store.stores import MODEL, Clock, open_test_store

NUM_PROCESSES = 8


async def claim_all(url: str) -> list[str]:
    """Ids of the jobs that this process has claimed, one at a time."""
    store = open_test_store(url, Clock())
    ids: list[str] = []
    while claimed := await store.claim(f"server {os.getpid()}", MODEL, 1):
        ids += [each.job.id for each in claimed]
    await store.close()
    return ids


def claim_in_a_child(url: str, start: tuple[int, int]) -> int:
    """Fork a process that claims once its parent closes the pipe `start`. Returns its id."""
    child = os.fork()
    if child == 0:
        read_end, write_end = start
        os.close(write_end)
        os.read(read_end, 1)
        ids = asyncio.run(claim_all(url))
        os.write(1, (" ".join(ids) + "\n").encode())
        os._exit(0)
    return child


def main() -> int:
    start = os.pipe()
    children = [claim_in_a_child(sys.argv[1], start) for _ in range(NUM_PROCESSES)]
    os.close(start[1])
    return max(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children)


if __name__ == "__main__":
    sys.exit(main())
